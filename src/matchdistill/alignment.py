"""Bringing two features of one position to the same layout and map size.

Axes: N batch, C channels, T tokens, P positions, * position axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """A view with the channels in axis 1: (N, T, C) -> (N, C, T), (N, H, W, C) -> (N, C, H, W)."""
    return features.movedim(channel_dim, 1)


def align_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the teacher's maps to the size of the student's: averaged where larger, else interpolated.

    Equal sizes are left as they are, tokens of equal number too. Otherwise tokens (N, C, T) become the largest square grid
    that they fill; the leading tokens beyond it (class, registers) have no place in the image and are left out.

    Args:
        student: (N, Cs, *).
        teacher: (N, Ct, *).

    Returns:
        Student and teacher with the same position axes.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    student, teacher = (_grid(maps) if maps.ndim == 3 else maps for maps in (student, teacher))
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"cannot bring teacher maps {tuple(teacher.shape)} to the student's {tuple(student.shape)}: expected both to "
            "be images (N, C, H, W) or tokens (N, T, C), or both to have the same axes"
        )
    size = student.shape[2:]
    if all(wanted <= given for wanted, given in zip(size, teacher.shape[2:], strict=True)):
        pools: dict[int, Callable[..., Tensor]]
        pools = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
        return student, pools[teacher.ndim](teacher, size)
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[teacher.ndim]
    return student, F.interpolate(teacher, size, mode=mode, align_corners=False)


def _grid(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[2])
    return tokens[:, :, tokens.shape[2] - side * side :].reshape(*tokens.shape[:2], side, side)

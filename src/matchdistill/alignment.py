"""Bringing two features of one position to the same layout and map size.

Axes: N batch, C channels, T tokens, L length of a sequence, P positions, * position axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """A view with the channels in axis 1: (N, T, C) -> (N, C, T), (N, H, W, C) -> (N, C, H, W)."""
    return features.movedim(channel_dim, 1)


def align_maps(student: Tensor, teacher: Tensor, sequences: bool = False) -> tuple[Tensor, Tensor]:
    """Bring the teacher's maps to the size of the student's: averaged where larger, else interpolated.

    Equal sizes are left as they are, tokens of equal number too. Otherwise tokens (N, C, T) become the largest grid that
    they fill, of the aspect ratio of the other maps, square where both are tokens; the leading tokens beyond it (class,
    registers) have no place in the image and are left out.

    Args:
        student: (N, Cs, *).
        teacher: (N, Ct, *).
        sequences: whether both are sequences (N, C, L) of one axis, not tokens of images.

    Returns:
        Student and teacher with the same position axes.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if sequences:
        length = student.shape[2]
        if length <= teacher.shape[2]:
            return student, F.adaptive_avg_pool1d(teacher, length)
        return student, F.interpolate(teacher, length, mode="linear", align_corners=False)
    student, teacher = _grid(student, teacher), _grid(teacher, student)
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"cannot bring teacher maps {tuple(teacher.shape)} to the student's {tuple(student.shape)}: expected both to "
            "be images (N, C, H, W) or tokens (N, T, C), or both to have the same axes"
        )
    size = student.shape[2:]
    if all(wanted <= given for wanted, given in zip(size, teacher.shape[2:], strict=True)):
        pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if teacher.ndim == 4 else F.adaptive_avg_pool3d
        return student, pool(teacher, size)
    mode = "bilinear" if teacher.ndim == 4 else "trilinear"
    return student, F.interpolate(teacher, size, mode=mode, align_corners=False)


def _grid(maps: Tensor, others: Tensor) -> Tensor:
    """Tokens (N, C, T) as (N, C, height, width), the others' aspect ratio; anything else as it is."""
    if maps.ndim != 3:
        return maps
    tokens = maps.shape[2]
    tall, wide = others.shape[2:] if others.ndim == 4 else (1, 1)
    height = max(1, min(tokens, math.isqrt(tokens * tall // wide)))
    width = max(1, min(tokens // height, (2 * height * wide + tall) // (2 * tall)))  # rounded
    return maps[:, :, tokens - height * width :].reshape(*maps.shape[:2], height, width)

"""Bringing two features of one position, and the mask of what counts in them, to the same layout and map size.

Axes: N batch, C channels, H and W pixels, T tokens, L length of a sequence, P positions, * position axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from matchdistill.layout import Layout
from matchdistill.losses import masked


def channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """A view with the channels in axis 1: (N, T, C) -> (N, C, T), (N, H, W, C) -> (N, C, H, W)."""
    return features.movedim(channel_dim, 1)


def as_map(features: Tensor, layout: Layout | None, channel_dim: int) -> Tensor:
    """Features with the channels in axis 1, and their positions as they lie in the image as far as the layout tells.

    Args:
        features: as they were tapped.
        layout: of the value in the pass that found the tap; None: unknown.
        channel_dim: axis of the channels.

    Raises:
        ValueError: windows, or another order of positions, whose number is not the one of that pass.
    """
    if layout is None or layout.is_map or layout.grid is None:
        return channels_second(features, channel_dim)
    if tuple(features.shape[1:]) == layout.shape[1:]:
        return layout.to_map(features)
    if not layout.in_order:
        raise ValueError(
            f"features {tuple(features.shape)} whose positions lie in windows of a map of {layout.grid} positions: expected "
            f"{('N', *layout.shape[1:])}; give example=, an input of the size that you train with"
        )
    return channels_second(features, channel_dim)


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


def align_masked(
    student: Tensor, teacher: Tensor, mask: Tensor, sequences: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`align_maps` for images that fill only a part of the input, in a padded batch.

    Args:
        student: (N, Cs, *).
        teacher: (N, Ct, *).
        mask: pixels of the input that belong to an image (N, H, W), bool, True.
        sequences: whether both are sequences (N, C, L) of one axis, not tokens of images.

    Returns:
        Student and teacher with the same position axes, and the positions that count (N, *). Where the teacher's map is
        of another size, its values are made of positions that count alone.

    Raises:
        ValueError: a mask that is not bool (N, H, W), a map without two position axes, or another number of images.
    """
    if sequences or student.shape[2:] == teacher.shape[2:]:
        return student, teacher, align_mask(mask, student.shape[2:])
    student, teacher = _grid(student, teacher), _grid(teacher, student)
    inside = align_mask(mask, teacher.shape[2:])
    share = align_maps(student, inside[:, None].to(teacher.dtype))[1]
    teacher = align_maps(student, masked(teacher, inside))[1] / share.masked_fill(share == 0, 1)
    return student, teacher, align_mask(mask, student.shape[2:]) & (share[:, 0] > 0)


def align_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """The positions of a map that count: those whose centre lies in an image.

    Args:
        mask: pixels of the input that belong to an image (N, H, W), bool, True.
        size: the map's position axes.

    Returns:
        (N, *size), bool.

    Raises:
        ValueError: a mask that is not bool (N, H, W), or a map that has not two axes, as tokens that fill no grid.

    Examples:
        >>> align_mask(torch.tensor([[[True, True, True, False]]]), (1, 2))
        tensor([[[ True, False]]])
    """
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(
            f"mask of {mask.dtype} {tuple(mask.shape)}: expected torch.bool (N, H, W), True at the pixels of an image"
        )
    if len(size) != 2:
        raise ValueError(
            f"a mask of pixels says nothing of features with position axes {tuple(size)}: expected maps (N, C, H, W); "
            "leave the mask out, or choose taps with maps"
        )
    # In integers, so that a centre on the edge falls the same way at every size.
    rows, columns = (
        (2 * torch.arange(cells, device=mask.device) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(size, mask.shape[1:], strict=True)
    )
    return mask[:, rows[:, None], columns]


def _grid(maps: Tensor, others: Tensor) -> Tensor:
    """Tokens (N, C, T) as (N, C, height, width), the others' aspect ratio; anything else as it is."""
    if maps.ndim != 3:
        return maps
    tokens = maps.shape[2]
    tall, wide = others.shape[2:] if others.ndim == 4 else (1, 1)
    height = max(1, min(tokens, math.isqrt(tokens * tall // wide)))
    width = max(1, min(tokens // height, (2 * height * wide + tall) // (2 * tall)))  # rounded
    return maps[:, :, tokens - height * width :].reshape(*maps.shape[:2], height, width)

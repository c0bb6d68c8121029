"""The steps of Matching Guided Distillation as pure tensor functions.

Source: K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020 (arXiv 2008.09958); margins and partial loss
after B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, P positions (`*` flattened).

A mask (N, *), bool, is True at the positions that count, where images are padded to a batch (see `losses`).

Each public function checks its arguments and calls the unchecked functions beside it (`similarity_sum`, `cost_of`,
`reduce_groups`, `negative_sum`, `margin_of`). The distiller calls the same ones, batch by batch. The losses are in `losses`.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from matchdistill.losses import kd_loss, masked, partial_loss
from matchdistill.reduction import Reduction, checked_reduction
from matchdistill.transport import groups_of_least_cost

__all__ = [
    "batchnorm_margin",
    "cost_of",
    "empirical_margin",
    "is_guided",
    "kd_loss",
    "margin_of",
    "matching_cost",
    "negative_sum",
    "orthogonal_map",
    "partial_loss",
    "random_assignment",
    "reduce_channels",
    "reduce_groups",
    "reduce_margin",
    "similarity_sum",
    "solve_assignment",
    "wide",
]

CLEAR = 1e5  # how far the least square of a singular value is from rounding errors, to be found from squares
OPEN = 1e-10  # of a covariance's length: below it, float64 does not tell directions from noise


def similarity_sum(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over samples of the cosine between every student and every teacher channel map, by one matrix product.

    Args:
        student: features (N, Cs, *).
        teacher: features (N, Ct, *), the same N and positions.
        mask: positions that count (N, *), bool; None: all.

    Returns:
        (Cs, Ct), float32 for half precision input, on the features' device, without a graph. A map of zeros, or without
        a position that counts, has cosine 0 with every map.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if student.ndim < 2 or teacher.ndim < 2:
        raise ValueError(
            f"features need a batch and a channel axis (N, C, *), got student {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}"
        )
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in every axis but the "
            "channels (axis 1): feed both the same batch, and pool or interpolate the larger map"
        )
    if student.is_complex() or teacher.is_complex() or 0 in student.shape[2:]:
        raise ValueError(
            f"features must be real and have at least one position, got student {student.dtype} {tuple(student.shape)}, "
            f"teacher {teacher.dtype} {tuple(teacher.shape)}"
        )
    # Autocast would run the product in half precision, whose sums over N * P terms lose the small differences.
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        return _unit_maps(masked(student, mask)) @ _unit_maps(masked(teacher, mask)).T


def _unit_maps(features: Tensor) -> Tensor:
    """(N, C, *) -> (C, N * P), every map of P values of length 1."""
    maps = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    maps = (maps.flatten(2) if maps.ndim > 2 else maps[:, :, None]).transpose(0, 1)
    # Scaled by its largest value first, the length of a tiny map does not vanish, and a map of zeros stays one.
    largest = torch.maximum(maps.amax(2, keepdim=True), -maps.amin(2, keepdim=True))
    # In one buffer: writing a second one for the first time takes longer than all the rest.
    unit = torch.div(maps, largest.masked_fill_(largest == 0, 1), out=maps.new_empty(maps.shape))
    return unit.div_(torch.linalg.vector_norm(unit, dim=2, keepdim=True).clamp_min_(1)).flatten(1)


def matching_cost(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of the squared distance between L2-normalised channel maps, ``2 - 2 cos`` (section 3.1).

    Args:
        student: features (N, Cs, *).
        teacher: features (N, Ct, *), the same N and positions.
        mask: positions that count (N, *), bool; None: all.

    Returns:
        Cost (Cs, Ct) between 0 (same pattern) and 4 (opposite pattern), float32 or float64, on the features' device.
        A map of zeros, or without a position that counts, resembles nothing: its cost is 2.

    Raises:
        ValueError: an empty batch, or shapes that do not fit each other.

    Examples:
        >>> maps = torch.eye(2).reshape(1, 2, 2)
        >>> matching_cost(maps, 3 * maps)
        tensor([[0., 2.],
                [2., 0.]])
    """
    similarity = similarity_sum(student, teacher, mask)
    if len(student) == 0:
        raise ValueError("the batch is empty: a matching cost needs at least one image")
    return cost_of(similarity, len(student))


def cost_of(similarity: Tensor, images: int) -> Tensor:
    """The matching cost (Cs, Ct) of a `similarity_sum` over so many images."""
    return 2 - 2 * similarity / images


def solve_assignment(cost: Tensor, group_size: int | None = None) -> Tensor:
    """Give every student channel its G teacher channels, none of them twice, at minimal total cost (section 3.2).

    The rectangular problem over all Ct columns is solved: with ``Ct % Cs != 0`` the least useful channels stay out.

    Args:
        cost: (Cs, Ct), finite.
        group_size: G; None takes ``Ct // Cs``, 1 is sparse matching.

    Returns:
        index (Cs, G), int64, on the cost's device; a group's members in ascending order. Where the teacher is narrower
        (``Ct < Cs``) G is 1, the Ct student channels of the best total get a teacher channel and the others -1.

    Raises:
        ValueError: a cost that is not a matrix or not finite, or groups that the teacher has too few channels for.

    Examples:
        >>> solve_assignment(torch.tensor([[0.0, 3.0, 1.0, 3.0], [0.0, 1.0, 3.0, 2.0]]))
        tensor([[0, 2],
                [1, 3]])
    """
    if cost.ndim != 2 or 0 in cost.shape or cost.is_complex():
        raise ValueError(
            f"cost must be a real matrix (Cs, Ct) with at least one entry, got {cost.dtype} of shape {tuple(cost.shape)}"
        )
    students, teachers = cost.shape
    group = max(1, teachers // students) if group_size is None else group_size
    if not isinstance(group, int) or group < 1 or (group > 1 and group * students > teachers):
        raise ValueError(
            f"group_size={group_size!r} does not fit {students} student and {teachers} teacher channels: expected 1 to "
            f"{max(1, teachers // students)}, or None for the largest"
        )
    matrix = cost.detach().to("cpu", torch.float64)
    if not matrix.isfinite().all():
        row, column = (~matrix.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"cost of student channel {row} and teacher channel {column} is {matrix[row, column]}: "
            "the features must be finite (check the networks' weights and input)"
        )
    return groups_of_least_cost(matrix, group).sort(1).values.contiguous().to(cost.device)


def random_assignment(cost: Tensor, group_size: int | None = None, generator: Generator | None = None) -> Tensor:
    """Draw groups at random, whatever they cost: the control that shows what the matching is worth.

    Args:
        cost: (Cs, Ct); only its shape and device matter.
        group_size: G; None takes ``Ct // Cs``.
        generator: source of the draws, on the CPU; None is torch's default generator.

    Returns:
        index (Cs, G), int64, in the form that `solve_assignment` describes.

    Raises:
        ValueError: a cost that is not a matrix, or groups that the teacher has too few channels for.

    Examples:
        >>> random_assignment(torch.zeros(2, 6), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return solve_assignment(torch.rand(cost.shape, generator=generator), group_size).to(cost.device)


def orthogonal_map(covariance: Tensor) -> Tensor:
    """The orthogonal map of teacher channels whose images are nearest to the student's: the Procrustes problem.

    It maximises ``trace(R K')`` over all R with ``R R' = I`` (``R' R = I`` where the teacher is narrower), for the
    covariance K: ``R = U V'`` of its singular value decomposition ``U S V'``.

    Source: P. Schoenemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31 (1966).

    Args:
        covariance: of student and teacher channels (Cs, Ct), finite.

    Returns:
        R (Cs, Ct), float64 where there is one, on the covariance's device. Channels that do not vary together with any
        other leave R open there; they get the part that is nearest to the first channels in order.

    Raises:
        ValueError: a covariance that is not a matrix or not finite.

    Examples:
        >>> orthogonal_map(torch.tensor([[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]])).round()
        tensor([[ 0., -1.,  0.],
                [ 1.,  0.,  0.]], dtype=torch.float64)
    """
    if covariance.ndim != 2 or 0 in covariance.shape or covariance.is_complex():
        raise ValueError(
            f"covariance must be a real matrix (Cs, Ct) with at least one entry, got {covariance.dtype} of shape "
            f"{tuple(covariance.shape)}"
        )
    if not covariance.isfinite().all():
        raise ValueError("covariance has values that are not finite: the features must be finite")
    matrix = covariance.detach().to(wide(covariance.device))
    flat = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    if values[0] > CLEAR * torch.finfo(values.dtype).eps * values[-1]:
        # In a third of the time: U S^-1 U' K, and a step of Newton and Schulz to the nearest orthogonal map.
        found: Tensor = (vectors * values.rsqrt()) @ (vectors.T @ flat)
        found = 1.5 * found - 0.5 * (found @ found.T) @ found
        return found if flat is matrix else found.T
    # So little of the identity decides what the covariance leaves open, and nothing else.
    identity = torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)
    scale = torch.linalg.matrix_norm(matrix)
    left, _, right = torch.linalg.svd(matrix + OPEN * scale.where(scale > 0, 1) * identity, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def reduce_channels(
    teacher: Tensor, index: Tensor, reduction: str | Reduction = "amp", generator: Generator | None = None
) -> Tensor:
    """Reduce the matched teacher channels to the student's width (section 3.3).

    Args:
        teacher: features (N, Ct, *).
        index: matched teacher channels (Cs, G), -1 for a student channel without any.
        reduction: "amp" (absolute max pooling), "rd" (random drop), "sm" (sparse matching, G = 1), "max", "mean",
            or a `Reduction`.
        generator: source of "rd"'s draws; None is torch's default generator.

    Returns:
        (N, Cs, *) without a graph; zeros where a student channel has no teacher channel.

    Raises:
        ValueError: an unknown reduction, or one that is one-to-one with G > 1; or an index that does not fit.

    Examples:
        >>> teacher = torch.tensor([[[1.0, -3.0], [-2.0, 2.0]]])
        >>> reduce_channels(teacher, torch.tensor([[0, 1]]), "amp")
        tensor([[[-2., -3.]]])
    """
    if teacher.ndim < 2:
        raise ValueError(f"features need a batch and a channel axis (N, C, *), got teacher {tuple(teacher.shape)}")
    rule = checked_reduction(reduction, index, teacher.shape[1])
    target = reduce_groups(teacher, index.clamp_min(0), rule, generator)
    return target.masked_fill(~is_guided(index).reshape(-1, *[1] * (teacher.ndim - 2)), 0)


@torch.no_grad()
def reduce_groups(teacher: Tensor, index: Tensor, rule: Reduction, generator: Generator | None = None) -> Tensor:
    """`reduce_channels` by an index (Cs, G) that has teacher channels everywhere, without a check of it."""
    return rule.channels(teacher, index, generator)


def is_guided(index: Tensor) -> Tensor:
    """Which student channels have teacher channels in an index (Cs, G), bool (Cs,)."""
    return index[:, 0] >= 0


def reduce_margin(
    margin: Tensor, index: Tensor, reduction: str | Reduction = "amp", generator: Generator | None = None
) -> Tensor:
    """Reduce the margins of the matched teacher channels.

    By the mean ("amp", "mean"), the maximum ("max"), one at random per student channel ("rd"), or the one ("sm").

    Args:
        margin: (Ct,).
        index: matched teacher channels (Cs, G), -1 for a student channel without any.
        reduction: "amp", "rd", "sm", "max", "mean", or a `Reduction`.
        generator: source of "rd"'s draws; None is torch's default generator.

    Returns:
        (Cs,); 0 where a student channel has no teacher channel.

    Raises:
        ValueError: an unknown reduction, or one that is one-to-one with G > 1; or an index that does not fit.
    """
    if margin.ndim != 1:
        raise ValueError(f"margin must have shape (Ct,), got {tuple(margin.shape)}")
    rule = checked_reduction(reduction, index, len(margin))
    return rule.margin(margin.detach()[index.clamp_min(0)], generator) * is_guided(index)


def batchnorm_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of the negative part of each channel, taken as Normal(bias, |weight|): ``E[x | x < 0]`` (Heo et al. 2019).

    Args:
        weight: batch norm scale (C,).
        bias: batch norm shift (C,).

    Returns:
        (C,), at most 0; ``-3 |weight|`` where less than one value in a thousand is negative.

    Raises:
        ValueError: shapes that are not one (C,).

    Examples:
        >>> batchnorm_margin(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, -2.0, 9.0]))
        tensor([-0.7979, -2.0000, -3.0000])
    """
    if weight.ndim != 1 or weight.shape != bias.shape:
        raise ValueError(
            f"a batch norm has scale and shift of one shape (C,), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    dtype = wide(weight.device)
    scale = weight.detach().to(dtype).abs()
    shift = bias.detach().to(dtype)
    # A scale of 0 (a pruned channel) is the limit of small ones: the constant `shift`, if negative.
    standard = shift / scale.clamp_min(torch.finfo(dtype).tiny)
    negative_share = torch.special.ndtr(-standard)
    density = torch.exp(-0.5 * standard.square()) / math.sqrt(2 * math.pi)
    margin = shift - scale * density / negative_share.clamp_min(1e-3)
    return torch.where(negative_share > 1e-3, margin, -3 * scale).to(weight.dtype)


def negative_sum(features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of each channel's negative values at the positions that count, (N, C, *) -> two (C,)."""
    others = [axis for axis in range(features.ndim) if axis != 1]
    negative, dtype = masked(features.detach().clamp_max(0), mask), wide(features.device)
    return negative.sum(others, dtype=dtype), (negative < 0).sum(others, dtype=dtype)


def wide(device: torch.device) -> torch.dtype:
    """The type of totals on a device: float64 wherever there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def empirical_margin(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each channel's negative values: the margin of a channel without batch norm.

    Args:
        features: (N, C, *).
        mask: positions that count (N, *), bool; None: all.

    Returns:
        (C,), float32 for half precision input; 0 for a channel that is never negative.

    Raises:
        ValueError: features without a channel axis, or a mask that does not fit.
    """
    if features.ndim < 2:
        raise ValueError(f"features need a batch and a channel axis (N, C, *), got {tuple(features.shape)}")
    total, count = negative_sum(features, mask)
    return margin_of(total, count).to(torch.promote_types(features.dtype, torch.float32))


def margin_of(total: Tensor, count: Tensor) -> Tensor:
    """The empirical margin (C,) of a `negative_sum`; 0 for a channel that is never negative."""
    return total / count.clamp_min(1)

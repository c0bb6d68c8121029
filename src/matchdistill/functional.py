"""The steps of Matching Guided Distillation as pure tensor functions.

Source: K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020 (arXiv 2008.09958); margins and partial loss
after B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, P positions (`*` flattened).

A mask (N, *), bool, is True at the positions that count, as those of an image in a padded batch; whatever the others hold
(NaN too) reaches neither a result nor a gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from matchdistill.reduction import Reduction, get_reduction


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


def masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features (N, C, *) with zeros at the positions that do not count; without a mask they themselves.

    Raises:
        ValueError: a mask that is not bool or not (N, *).
    """
    return features if mask is None else features.masked_fill(_left_out(features, mask), 0)


def _left_out(features: Tensor, mask: Tensor) -> Tensor:
    """True at the positions (N, 1, *) that do not count."""
    expected = (*features.shape[:1], *features.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"mask of {mask.dtype} {tuple(mask.shape)} for features {tuple(features.shape)}: expected torch.bool "
            f"{expected}, True at the positions that count"
        )
    return ~mask[:, None]


def _unit_maps(features: Tensor) -> Tensor:
    """(N, C, *) -> (C, N * P), every map of P values of length 1."""
    maps = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    maps = maps.flatten(2) if maps.ndim > 2 else maps[:, :, None]
    # Scaled by its largest value first, the length of a tiny map does not vanish, and a map of zeros stays one.
    largest = torch.maximum(maps.amax(2, keepdim=True), -maps.amin(2, keepdim=True))
    scaled = maps / largest.masked_fill(largest == 0, 1)
    length = torch.linalg.vector_norm(scaled, dim=2, keepdim=True).clamp_min(1)
    unit = scaled.new_empty(scaled.shape[1], scaled.shape[0], scaled.shape[2])
    return torch.div(scaled.transpose(0, 1), length.transpose(0, 1), out=unit).flatten(1)


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
    return 2 - 2 * similarity / len(student)


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
    used = group * students
    matrix = matrix.repeat(group, 1)
    if 2 * teachers < 3 * used <= 3 * teachers:
        # With as many rows as columns, what a row or a column costs with all alike changes no choice; without it the solver
        # is up to ten times faster. Rows that cost nothing take the columns left over, unless they were too many.
        matrix = torch.cat([matrix, matrix.new_zeros(teachers - used, teachers)])
        matrix -= matrix[:used].amin(0)
        matrix -= matrix.amin(1, keepdim=True)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(matrix.numpy()))
    index = torch.full((len(matrix),), -1)
    index[rows] = columns
    return index[:used].reshape(group, students).T.sort(1).values.contiguous().to(cost.device)


def random_assignment(cost: Tensor, group_size: int | None = None, generator: Generator | None = None) -> Tensor:
    """As `solve_assignment`, but any groups, whatever they cost: the control that shows what the matching is worth.

    Args:
        cost: (Cs, Ct); its shape and device matter.
        group_size: as of `solve_assignment`.
        generator: source of the draws, on the CPU; None is torch's default generator.

    Returns:
        index (Cs, G), as of `solve_assignment`.

    Raises:
        ValueError: as of `solve_assignment`.

    Examples:
        >>> random_assignment(torch.zeros(2, 6), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return solve_assignment(torch.rand(cost.shape, generator=generator), group_size).to(cost.device)


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
    rule = _checked(index, reduction, teacher.shape[1])
    with torch.no_grad():
        unguided = (index[:, 0] < 0).reshape(-1, *[1] * (teacher.ndim - 2))
        return rule.channels(teacher, index.clamp_min(0), generator).masked_fill(unguided, 0)


def reduce_margin(
    margin: Tensor, index: Tensor, reduction: str | Reduction = "amp", generator: Generator | None = None
) -> Tensor:
    """Reduce the margins of the matched teacher channels.

    By the mean ("amp", "mean"), the maximum ("max"), one at random per student channel ("rd"), or the one ("sm").

    Args:
        margin: (Ct,).
        index: matched teacher channels (Cs, G), -1 for a student channel without any.
        reduction: as in `reduce_channels`.
        generator: source of "rd"'s draws; None is torch's default generator.

    Returns:
        (Cs,); 0 where a student channel has no teacher channel.

    Raises:
        ValueError: an unknown reduction, or one that is one-to-one with G > 1; or an index that does not fit.
    """
    if margin.ndim != 1:
        raise ValueError(f"margin must have shape (Ct,), got {tuple(margin.shape)}")
    rule = _checked(index, reduction, len(margin))
    return rule.margin(margin.detach()[index.clamp_min(0)], generator) * (index[:, 0] >= 0)


def _checked(index: Tensor, reduction: str | Reduction, teachers: int) -> Reduction:
    """The rule of a reduction, for an index into so many teacher channels."""
    rule = get_reduction(reduction)
    if index.ndim != 2 or index.shape[1] < 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 of shape (Cs, G), got {index.dtype} {tuple(index.shape)}")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < teachers:
        raise ValueError(
            f"index holds {int(index.min())} to {int(index.max())}, but there are {teachers} teacher channels: expected "
            f"numbers from 0 to {teachers - 1}, or -1 for none"
        )
    if rule.one_to_one and index.shape[1] != 1:
        raise ValueError(
            f"reduction {reduction!r} takes one teacher channel per student channel, got groups of {index.shape[1]}: "
            "solve the assignment with group_size=1"
        )
    return rule


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
    return (total / count.clamp_min(1)).to(torch.promote_types(features.dtype, torch.float32))


def partial_loss(
    student: Tensor,
    target: Tensor,
    margin: Tensor,
    reduction: Literal["sum", "mean"] = "sum",
    mask: Tensor | None = None,
) -> Tensor:
    """Squared distance to ``t = max(target, margin)`` wherever ``student > t`` or ``t > 0`` (Heo et al. 2019).

    A student that is already below a negative target is left alone: both vanish behind the activation.

    Args:
        student: normalised features (N, Cs, *), in the graph.
        target: reduced teacher features (N, Cs, *).
        margin: reduced margins (Cs,).
        reduction: "sum" over all elements, or "mean": that sum over the number of all elements.
        mask: positions that count (N, *), bool: "all elements" are theirs; None: all.

    Returns:
        A scalar, float32 for half precision input, that sends gradients to the student alone; where no element
        counts, a zero in the graph.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.

    Examples:
        >>> partial_loss(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-1.0, 3.0]]), torch.tensor([-1.0, -1.0]))
        tensor(4.)
    """
    if student.shape != target.shape or student.ndim < 2 or margin.shape != student.shape[1:2]:
        raise ValueError(
            "expected student and target of one shape (N, Cs, *) and margin (Cs,), got "
            f"student {tuple(student.shape)}, target {tuple(target.shape)}, margin {tuple(margin.shape)}"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}: expected 'sum' or 'mean'")
    if student.is_complex() or target.is_complex():
        raise ValueError(f"features must be real, got student {student.dtype}, target {target.dtype}")
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    total, _ = _PartialSquares.apply(student, _goal(target, margin, student.dtype), mask)
    return _averaged(total, student, reduction, mask)


def _goal(target: Tensor, margin: Tensor, dtype: torch.dtype) -> Tensor:
    """The target (N, Cs, *), nowhere below its margin (Cs,)."""
    floor = margin.detach().to(dtype).reshape(-1, *[1] * (target.ndim - 2))
    return torch.maximum(target.detach().to(dtype), floor)


def ignored(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Where the `partial_loss` of the same arguments leaves the student alone, bool (N, Cs, *).

    Examples:
        >>> ignored(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-1.0, 3.0]]), torch.tensor([-1.0, -1.0]))
        tensor([[ True, False]])
    """
    goal = _goal(target, margin, torch.promote_types(student.dtype, torch.float32))
    return _left_alone(student.detach() - goal, goal)


def _left_alone(differences: Tensor, goal: Tensor) -> Tensor:
    # Asked the other way round, a NaN on either side is not taken for agreement but reaches the loss.
    return (differences <= 0) & (goal <= 0)


class _PartialSquares(torch.autograd.Function):
    """Sum of the squares of partial differences, and these; of all that it computes it keeps the differences alone.

    They are in the graph too, so that the gradient, which is made of them, can be differentiated.
    """

    @staticmethod
    def forward(student: Tensor, goal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        differences = student - goal
        left_alone = _left_alone(differences, goal)
        if mask is not None:
            left_alone |= _left_out(student, mask)
        # The sign of the zero tells what is left alone from what has reached its goal: `student - goal` is no -0.0 there.
        differences.masked_fill_(left_alone, -0.0)
        return differences.square().sum(), differences

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, total: Tensor | None, each: Tensor | None) -> tuple[Tensor | None, None, None]:
        (differences,) = ctx.saved_tensors
        gradient = None if total is None else differences * (2 * total)
        if each is not None:
            own = each.masked_fill((differences == 0) & differences.signbit(), 0)
            gradient = own if gradient is None else gradient + own
        return gradient, None, None


def squared(differences: Tensor, reduction: Literal["sum", "mean"], mask: Tensor | None = None) -> Tensor:
    """Sum or mean of the squares of (N, C, *) at the positions that count; zero in the graph where there are none."""
    return _averaged(masked(differences, mask).square().sum(), differences, reduction, mask)


def _averaged(total: Tensor, of: Tensor, reduction: Literal["sum", "mean"], mask: Tensor | None) -> Tensor:
    """A sum over values (N, C, *) at the positions that count, or the mean."""
    if reduction == "sum":
        return total
    if mask is None:
        return total / max(of.numel(), 1)
    return total / (mask.sum() * of.shape[1]).clamp_min(1)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.5) -> Tensor:
    """Hinton's distillation of the output: ``T^2 KL(softmax(t / T) || softmax(s / T))``, mean over the batch.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: logits (N, classes), in the graph.
        teacher: logits (N, classes).
        temperature: T.

    Returns:
        A scalar that sends gradients to the student alone.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.

    Examples:
        >>> kd_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} must have one shape: give "
            "both networks the same classes"
        )
    if student.ndim != 2:
        raise ValueError(f"logits must have shape (N, classes), got {tuple(student.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, -1),
        F.log_softmax(teacher.detach().float() / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2

"""The losses of Matching Guided Distillation as pure tensor functions, and sums over the positions that count.

Source: the partial distance is that of B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

A mask (N, *), bool, is True at the positions that count, where images are padded to a batch. Whatever the others hold (NaN
too) reaches neither a result nor a gradient.

Axes: N batch, C channels, Cs student channels, * position axes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


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
    total, _ = PartialSquares.apply(student, goal_of(target, margin, student.dtype), mask)
    return sum_or_mean(total, student, reduction, mask)


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


def goal_of(target: Tensor, margin: Tensor, dtype: torch.dtype) -> Tensor:
    """The target (N, Cs, *), nowhere below its margin (Cs,)."""
    floor = margin.detach().to(dtype).reshape(-1, *[1] * (target.ndim - 2))
    return torch.maximum(target.detach().to(dtype), floor)


def ignored(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Where `partial_loss` of the same arguments leaves the student alone, bool (N, Cs, *).

    Args:
        student: normalised features (N, Cs, *).
        target: reduced teacher features (N, Cs, *).
        margin: reduced margins (Cs,).

    Examples:
        >>> ignored(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-1.0, 3.0]]), torch.tensor([-1.0, -1.0]))
        tensor([[ True, False]])
    """
    goal = goal_of(target, margin, torch.promote_types(student.dtype, torch.float32))
    return _left_alone(student.detach() - goal, goal)


def _left_alone(differences: Tensor, goal: Tensor) -> Tensor:
    # Asked the other way round, a NaN on either side is not taken for agreement but reaches the loss.
    return (differences <= 0) & (goal <= 0)


class PartialSquares(torch.autograd.Function):
    """Sum of the squared differences of a student (N, Cs, *) to its goal where it is not left alone, and the differences.

    Backward needs the differences alone, and nothing else is kept. They are an output too, in the graph: the gradient is
    made of them and can therefore be differentiated.
    """

    @staticmethod
    def forward(student: Tensor, goal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        differences = student - goal
        left_alone = _left_alone(differences, goal)
        if mask is not None:
            left_alone |= left_out(student, mask)
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


def masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features (N, C, *) with zeros at the positions that do not count; without a mask they themselves.

    Raises:
        ValueError: a mask that is not bool or not (N, *).
    """
    return features if mask is None else features.masked_fill(left_out(features, mask), 0)


def left_out(features: Tensor, mask: Tensor) -> Tensor:
    """Where positions of features (N, C, *) do not count, bool (N, 1, *).

    Raises:
        ValueError: a mask that is not bool or not (N, *).
    """
    expected = (*features.shape[:1], *features.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"mask of {mask.dtype} {tuple(mask.shape)} for features {tuple(features.shape)}: expected torch.bool "
            f"{expected}, True at the positions that count"
        )
    return ~mask[:, None]


def squared(differences: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None) -> Tensor:
    """Sum or mean of the squares of (N, C, *) at the positions that count; a zero in the graph if there are none."""
    return sum_or_mean(masked(differences, mask).square().sum(), differences, loss_reduction, mask)


def sum_or_mean(total: Tensor, values: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None) -> Tensor:
    """The total over the values (N, C, *) that count, or their mean: the total over their number."""
    if loss_reduction == "sum":
        return total
    if mask is None:
        return total / max(values.numel(), 1)
    return total / (mask.sum() * values.shape[1]).clamp_min(1)

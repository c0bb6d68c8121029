"""The partial distance of student features to a goal, and its gradient in the memory of one tensor.

Source: B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

Axes: N batch, Cs student channels, * position axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matchdistill.masking import left_out


def goal_of(target: Tensor, margin: Tensor, dtype: torch.dtype) -> Tensor:
    """The target (N, Cs, *), nowhere below its margin (Cs,)."""
    floor = margin.detach().to(dtype).reshape(-1, *[1] * (target.ndim - 2))
    return torch.maximum(target.detach().to(dtype), floor)


def ignored(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Where `functional.partial_loss` of the same arguments leaves the student alone, bool (N, Cs, *).

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

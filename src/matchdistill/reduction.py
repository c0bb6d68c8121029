"""The reductions: how the G teacher channels matched to a student channel become one target channel.

Each is a pair of functions, one for feature maps and one for margins. Your own is another `Reduction`; an entry in
`REDUCTIONS` gives it a name.

Axes: N batch, Cs student channels, Ct teacher channels, G group, * positions (any number of axes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

ALIGN = "align"  # in a reduction's place: no groups of channels, but a map of all of them


class Reduction(NamedTuple):
    """A rule for the matched channels and one for their margins (Yue et al. 2020, section 3.3).

    Attributes:
        channels: maps (teacher (N, Ct, *), index (Cs, G), generator) to (N, Cs, *).
        margin: maps (margins of the groups (Cs, G), generator) to (Cs,).
        one_to_one: whether every student channel gets a single teacher channel.
        deterministic: whether ``channels`` draws nothing at random. A distiller may then reduce a value while the teacher
            runs, instead of a copy of the whole value later.
    """

    channels: Callable[[Tensor, Tensor, Generator | None], Tensor]
    margin: Callable[[Tensor, Generator | None], Tensor]
    one_to_one: bool = False
    deterministic: bool = False


def _select(teacher: Tensor, members: Tensor) -> Tensor:
    """The channels (Cs,) of the teacher, as a tensor of their own with its layout."""
    if teacher.ndim == 4 and not teacher.is_contiguous() and teacher.is_contiguous(memory_format=torch.channels_last):
        return teacher.movedim(1, 3).index_select(3, members).movedim(3, 1)  # index_select would copy it first
    return teacher.index_select(1, members)


def _first_member(teacher: Tensor, index: Tensor) -> Tensor:
    """The first teacher channel of each group."""
    return _select(teacher, index[:, 0])


def _absolute_max(teacher: Tensor, index: Tensor, generator: Generator | None) -> Tensor:
    """The value of largest magnitude, its sign kept; a tie goes to the first."""
    # A running maximum holds few maps at a time; stacking the group would hold G of them. The larger magnitude has the sign
    # of the sum, and where that is 0 of the first: on CPUs three times as fast as a selection by torch.where.
    below_rounding = torch.finfo(teacher.dtype).eps / 8
    best = _first_member(teacher, index)
    for member in range(1, index.shape[1]):
        candidate = _select(teacher, index[:, member])
        sign = (best + candidate).add_(best, alpha=below_rounding)
        best = torch.maximum(best.abs_(), candidate.abs_()).copysign_(sign)
    return best


def _maximum(teacher: Tensor, index: Tensor, generator: Generator | None) -> Tensor:
    best = _first_member(teacher, index)
    for member in range(1, index.shape[1]):
        best = torch.maximum(best, _select(teacher, index[:, member]))
    return best


def _mean(teacher: Tensor, index: Tensor, generator: Generator | None) -> Tensor:
    # In half precision a sum can pass the largest number though the mean does not.
    total = _first_member(teacher, index).to(torch.promote_types(teacher.dtype, torch.float32))
    for member in range(1, index.shape[1]):
        total = total + _select(teacher, index[:, member])
    return (total / index.shape[1]).to(teacher.dtype)


def _random(teacher: Tensor, index: Tensor, generator: Generator | None) -> Tensor:
    """One member at random, drawn anew per sample, student channel and position."""
    kept = _first_member(teacher, index)
    drawn = torch.randint(index.shape[1], kept.shape, generator=generator, device=_draw_device(kept, generator))
    drawn = drawn.to(kept.device)
    for member in range(1, index.shape[1]):
        kept = torch.where(drawn == member, _select(teacher, index[:, member]), kept)
    return kept


def _random_margin(margins: Tensor, generator: Generator | None) -> Tensor:
    drawn = torch.randint(
        margins.shape[1], margins.shape[:1], generator=generator, device=_draw_device(margins, generator)
    )
    return margins.gather(1, drawn.to(margins.device)[:, None])[:, 0]


def _draw_device(values: Tensor, generator: Generator | None) -> torch.device:
    return values.device if generator is None else generator.device


REDUCTIONS = {
    "sm": Reduction(
        lambda teacher, index, _: _first_member(teacher, index),
        lambda margins, _: margins[:, 0],
        one_to_one=True,
        deterministic=True,
    ),
    "rd": Reduction(_random, _random_margin),
    "amp": Reduction(_absolute_max, lambda margins, _: margins.mean(1), deterministic=True),
    "max": Reduction(_maximum, lambda margins, _: margins.amax(1), deterministic=True),
    "mean": Reduction(_mean, lambda margins, _: margins.mean(1), deterministic=True),
}


def get_reduction(reduction: str | Reduction) -> Reduction:
    """The reduction of that name, or the one given.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(reduction, Reduction):
        return reduction
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"unknown reduction {reduction!r}: expected one of {', '.join([*REDUCTIONS, ALIGN])}, or a Reduction"
        )
    return REDUCTIONS[reduction]


def checked_reduction(reduction: str | Reduction, index: Tensor, teachers: int) -> Reduction:
    """The rule of a reduction, after a look at the index (Cs, G) that it is given; reads the index from its device.

    Args:
        reduction: a name or a `Reduction`.
        index: teacher channels of each student channel, -1 for none.
        teachers: the number of teacher channels.

    Raises:
        ValueError: an unknown name, an index that does not fit, or groups for a rule that is one-to-one.
    """
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

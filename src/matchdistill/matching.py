"""The matching of one position: costs summed over the images of a refresh, and the result to look at.

Axes: N batch, Cs student channels, Ct teacher channels, G group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from matchdistill.functional import cost_of, is_guided, margin_of, negative_sum, similarity_sum, wide

Sums = TypeVar("Sums", bound="FeatureSums")


class FeatureSums:
    """Sums over many batches, and over all ranks, in memory that does not grow.

    Everything is summed in float64 on the features' device, without waiting for it.

    Attributes:
        images: number of images.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self.images = 0

    def parts(self, student: Tensor, teacher: Tensor, mask: Tensor | None, images: int) -> list[Tensor]:
        """What a batch of so many images adds, in the order of `shapes`."""
        raise NotImplementedError

    def shapes(self, students: int, teachers: int) -> list[tuple[int, ...]]:
        """The shapes of the sums for so many channels; the first one is (Cs, Ct)."""
        raise NotImplementedError

    def empty(self: Sums) -> Sums:
        """Sums of the same kind over no images."""
        return type(self)()

    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, images: int | None = None) -> None:
        """Add a batch.

        Args:
            student: features (N, Cs, *).
            teacher: features (N, Ct, *) of the same images and positions.
            mask: positions that count (N, *), bool; None: all.
            images: how many images they are of; None: N. Pooled values are one map of all images of a batch.
        """
        images = len(student) if images is None else images
        batch = self.parts(student, teacher, mask, images)
        if not self._sums:
            self._start(student.shape[1], teacher.shape[1], student.device)
        if batch[0].shape != self._sums[0].shape:
            raise ValueError(
                f"channels (Cs, Ct) changed from {tuple(self._sums[0].shape)} to {tuple(batch[0].shape)} between batches: "
                "accumulate the features of one position only"
            )
        for total, part in zip(self._sums, batch, strict=True):
            total += part
        self.images += images

    def over_ranks(self: Sums, students: int, teachers: int, device: torch.device) -> Sums:
        """The sums over the images of all ranks, on every rank; a rank may have seen none."""
        if not self._sums:
            self._start(students, teachers, device)
        reduced = self + self.empty()
        images = torch.tensor(self.images, device=device)
        for total in (*reduced._sums, images):
            dist.all_reduce(total)
        reduced.images = int(images)
        return reduced

    def __add__(self: Sums, other: Sums) -> Sums:
        """The sums over the images of both, which stay as they are."""
        both = self.empty()
        parts = [sums for sums in (self._sums, other._sums) if sums]
        both._sums = [sum(totals[1:], totals[0].clone()) for totals in zip(*parts, strict=True)]
        both.images = self.images + other.images
        return both

    def _start(self, students: int, teachers: int, device: torch.device) -> None:
        self._sums = [torch.zeros(s, dtype=wide(device), device=device) for s in self.shapes(students, teachers)]

    def _check_seen(self) -> None:
        if self.images == 0:
            raise ValueError("no image was seen: a matching needs at least one batch")


class CostAccumulator(FeatureSums):
    """Matching cost and empirical margins over many batches, and over all ranks; see `FeatureSums`.

    Args:
        margins: whether the margins are measured too.
    """

    def __init__(self, margins: bool = True) -> None:
        super().__init__()
        self._margins = margins

    def empty(self) -> CostAccumulator:
        """Sums of the same kind over no images."""
        return CostAccumulator(self._margins)

    def parts(self, student: Tensor, teacher: Tensor, mask: Tensor | None, images: int) -> list[Tensor]:
        """Similarities (Cs, Ct), and sum and number of the teacher's negative values (Ct,)."""
        similarity = similarity_sum(student, teacher, mask)
        if images != len(student):  # a map of several images counts as much as they do: a last batch may have few
            similarity *= images / max(1, len(student))
        return [similarity, *negative_sum(teacher, mask)] if self._margins else [similarity]

    def shapes(self, students: int, teachers: int) -> list[tuple[int, ...]]:
        """(Cs, Ct), and twice (Ct,) where margins are measured."""
        return [(students, teachers), *[(teachers,)] * (2 * self._margins)]

    def compute(self) -> Tensor:
        """Cost (Cs, Ct), float64: mean over the images of ``2 - 2 cos``.

        Raises:
            ValueError: no image was seen.
        """
        self._check_seen()
        return cost_of(self._sums[0], self.images)

    def margin(self) -> Tensor:
        """Mean of each teacher channel's negative values (Ct,), float64.

        Raises:
            ValueError: no image was seen, or the margins were not measured.
        """
        self._check_seen()
        if len(self._sums) == 1:
            raise ValueError("the margins were not measured: expected CostAccumulator(margins=True)")
        return margin_of(*self._sums[1:])


@dataclass(frozen=True)
class Matching:
    """What was matched at one position.

    Attributes:
        name: the position, "teacher tap -> student tap".
        index: matched teacher channels (Cs, G), -1 where a student channel has none.
        cost: matching cost (Cs, Ct), float32; it was solved for in float64.
        images: how many images the cost is of.
        churn: share of the teacher channels that changed their student channel at this refresh; None at the first.
    """

    name: str
    index: Tensor
    cost: Tensor
    images: int
    churn: float | None = None

    @property
    def group_size(self) -> int:
        """G, the number of teacher channels per student channel."""
        return self.index.shape[1]

    @property
    def similarity(self) -> Tensor:
        """Mean cosine of every student channel to its teacher channels (Cs,); NaN where it has none."""
        cosine = 1 - self.cost.gather(1, self.index.clamp_min(0)).mean(1) / 2
        return cosine.masked_fill(~is_guided(self.index), torch.nan)

    @property
    def mean_cost(self) -> float:
        """Mean cost of the matched pairs: what the assignment minimises."""
        return objective(self.cost, self.index)

    def __str__(self) -> str:
        students, teachers = self.cost.shape
        quantiles = torch.tensor([0.0, 0.5, 1.0]).to(self.cost)
        lowest, middle, highest = torch.nanquantile(self.similarity, quantiles).tolist()
        churn = "" if self.churn is None else f", churn {self.churn:.0%}"
        return (
            f"{self.name}: {teachers} -> {students} channels, groups of {self.group_size}, {self.images} images, "
            f"mean cost {self.mean_cost:.3f}, cosine {lowest:.2f} / {middle:.2f} / {highest:.2f} (min / median / max){churn}"
        )


def logged(matchings: Sequence[Matching]) -> dict[str, float]:
    """What a refresh came to, for the logs: ``matching/cost_0``, and from the second one on ``matching/churn_0``, ..."""
    values: dict[str, float] = {}
    for place, matching in enumerate(matchings):
        values[f"matching/cost_{place}"] = matching.mean_cost
        if matching.churn is not None:
            values[f"matching/churn_{place}"] = matching.churn
    return values


def objective(cost: Tensor, index: Tensor) -> float:
    """Mean cost (Cs, Ct) of the pairs of a matching (Cs, G)."""
    guided = is_guided(index)
    return cost[guided].gather(1, index[guided]).mean(dtype=wide(cost.device)).item()


def regret(halves: Sequence[Tensor], solve: Callable[[Tensor], Tensor]) -> float:
    """How much a matching loses by having seen only half of the images, as a share of the objective.

    Each half's matching is tried on the other half, where that one's own is the best. What lies between them has two
    parts, on average and to first order equal: what the one lacks on images that it was not made for, and what the other
    gains on those that it was. So half of it is what a matching of half of the images lacks to the best one for all there
    are; that of both halves together lacks less still, about half as much.

    Args:
        halves: the costs (Cs, Ct) of two sets of images.
        solve: finds the matching (Cs, G) of a cost.

    Examples:
        >>> from matchdistill.functional import solve_assignment
        >>> regret([torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])], lambda cost: solve_assignment(cost, 1))
        0.5
        >>> regret([torch.tensor([[1.0, 2.0]]), torch.tensor([[1.1, 1.9]])], lambda cost: solve_assignment(cost, 1))
        0.0
    """
    indices = [solve(cost) for cost in halves]
    own, swapped = (
        sum(objective(cost, index) for cost, index in zip(halves, order, strict=True))
        for order in (indices, indices[::-1])
    )
    return regret_of(own, swapped)


def regret_of(own: float, swapped: float) -> float:
    """`regret`, of the objectives of two halves by the solutions of their own, and by each other's."""
    if swapped <= own:
        return 0.0
    return (swapped - own) / own / 2 if own > 0 else math.inf


def churn(before: Tensor, after: Tensor, teacher_channels: int) -> float:
    """Share of the Ct teacher channels whose student channel (or having none) differs between two indices (Cs, G)."""
    owners = [_owner(index, teacher_channels) for index in (before, after)]
    return int((owners[0] != owners[1]).sum()) / teacher_channels


def _owner(index: Tensor, teacher_channels: int) -> Tensor:
    """The student channel of every teacher channel (Ct,), -1 for none."""
    owner = torch.full((teacher_channels,), -1, device=index.device)
    students = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    matched = index >= 0
    owner[index[matched]] = students[matched]
    return owner

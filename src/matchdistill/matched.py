"""The position of Matching Guided Distillation: each student channel's target is a group of teacher channels, reduced.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, M student channels, * position axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matchdistill.distributed import from_rank_0
from matchdistill.functional import is_guided, reduce_groups, reduce_margin
from matchdistill.matching import CostAccumulator, Matching, churn, regret
from matchdistill.options import MatchingOptions
from matchdistill.reduction import Reduction, get_reduction
from matchdistill.refreshed import RefreshedPosition
from matchdistill.taps import Tap
from matchdistill.trace import Operation


class MatchedPosition(RefreshedPosition):
    """A position whose targets are groups of teacher channels, assigned to the student's channels.

    Attributes:
        index: matched teacher channels (Cs, G), -1 for a student channel without any.
    """

    index: Tensor

    def __init__(
        self,
        teacher: Tap,
        student: Tap,
        values: tuple[Operation, Operation],
        margin_norm: tuple[str, nn.Module] | None,
        options: MatchingOptions,
    ) -> None:
        super().__init__(teacher, student, values, margin_norm, options)
        self.matcher, self.hysteresis = options.matcher, options.hysteresis
        group = 1 if self.rule.one_to_one else max(1, self.teacher_channels // self.student_channels)
        self.register_buffer("index", torch.full((self.student_channels, group), -1))

    @property
    def rule(self) -> Reduction:
        """The reduction; by name where it has one, as not every function can be pickled."""
        return get_reduction(self.reduction)

    @property
    def has_matching(self) -> bool:
        """Whether a refresh, or a loaded state, has assigned teacher channels."""
        return bool(is_guided(self.index).any())

    @property
    def group_size(self) -> int:
        """G, the number of teacher channels of each group."""
        return self.index.shape[1]

    @property
    def deterministic(self) -> bool:
        """Whether the reduction draws nothing."""
        return self.rule.deterministic

    def target(self, teacher: Tensor) -> Tensor:
        """The target maps (N, C, *) of the guided student channels, from the teacher's (N, Ct, *)."""
        guided = self.guided()
        return reduce_groups(teacher, self.index if guided is None else self.index[guided], self.rule)

    def guided(self) -> Tensor | None:
        """The student channels (Ct,) with a partner, where the teacher is narrower; None: all have one."""
        if self.teacher_channels >= self.student_channels:
            return None
        # A stable sort finds them without asking the device.
        return is_guided(self.index).to(torch.uint8).argsort(stable=True, descending=True)[: self.teacher_channels]

    def accumulator(self) -> CostAccumulator:
        """What adds up costs, and margins where they are measured, for `solve`."""
        return CostAccumulator(margins=self.margin_norm is None)

    def assignment(self, cost: Tensor) -> Tensor:
        """The index (Cs, G) that the matcher finds for a cost (Cs, Ct); the matching in force stays as it is.

        Raises:
            ValueError: a cost that is not finite; the position is named.
        """
        try:
            index = self.matcher(self._sticky(cost), self.index.shape[1]).to(self.index.device)
        except ValueError as error:
            raise ValueError(f"position {self.name}: {error}") from error
        if index.shape != self.index.shape:
            raise ValueError(
                f"position {self.name}: the matcher gives an index {tuple(index.shape)}, expected {tuple(self.index.shape)}"
            )
        return index

    def regret(self, halves: Sequence[CostAccumulator]) -> float:
        """What a matching lacks that has seen half of the images: see `matching.regret`."""
        return regret([half.compute() for half in halves], self.assignment)

    def solve(self, sums: CostAccumulator) -> Matching:
        """Match by the summed costs and take the margins from the teacher as it is now.

        Raises:
            ValueError: a cost that is not finite; the position is named.
        """
        cost = sums.compute()
        index = from_rank_0(self.assignment(cost))  # random choices must not differ, of margins too
        changed = churn(self.index, index, self.teacher_channels) if self.has_matching else None
        margin = sums.margin() if self.margin_norm is None else self.teacher_margin()
        self.index.copy_(index)
        self.margin.copy_(from_rank_0(reduce_margin(margin.to(index.device), index, self.rule)))
        # Kept until the next refresh: in float64 it would be the largest thing that a step holds beside the networks.
        self.matching = Matching(self.name, index, cost.float(), sums.images, changed)
        return self.matching

    def found(self, sums: CostAccumulator) -> Matching:
        """The matching in force, with the costs of the images of the sums."""
        return Matching(self.name, self.index, sums.compute().float(), sums.images)

    def members(self, channels: Tensor, fit: Matching, most: int) -> Tensor:
        """The teacher channels of the groups of student channels, the most similar first."""
        group = self.index[channels]
        return group.gather(1, fit.cost[channels].gather(1, group).argsort(1))[:, :most]

    def _sticky(self, cost: Tensor) -> Tensor:
        """The cost (Cs, Ct), lowered by the hysteresis for the pairs in force."""
        lower = -self.hysteresis * (self.index >= 0).to(cost)
        return cost.scatter_add(1, self.index.clamp_min(0), lower) if self.hysteresis else cost

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, group size and where the margins come from."""
        margins = f"from {self.margin_norm}" if self.margin_norm else "measured"
        return f"{super().extra_repr()}, groups of {self.index.shape[1]}, margins {margins}"

"""One distillation position: what is taken of two networks, brought to one layout, and compared.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, * position axes.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from matchdistill.alignment import align_maps, align_mask, align_masked, as_map
from matchdistill.distributed import from_rank_0, rank_and_world
from matchdistill.functional import batchnorm_margin, is_guided, reduce_groups, reduce_margin
from matchdistill.losses import masked, partial_loss
from matchdistill.matching import CostAccumulator, Matching, churn
from matchdistill.messages import cause
from matchdistill.options import MatchingOptions
from matchdistill.reduction import Reduction, get_reduction
from matchdistill.taps import Tap
from matchdistill.trace import Operation


class FeaturePosition(nn.Module):
    """One distillation position: two taps, and the loss of what they take.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the batch norm that the teacher's value comes from; None: there is none.

    Attributes:
        guided_share: the part of the student's body, by weights, that leads to its value.
        are_maps: whether both values are maps whose positions lie as they lie in the image, as far as is known.
    """

    guided_share = 1.0

    def __init__(
        self, teacher: Tap, student: Tap, values: tuple[Operation, Operation], margin_norm: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self._margin_norm = margin_norm  # in a tuple, as it is the teacher's: not a submodule
        self.channel_dims = values[0].channels_axis, values[1].channels_axis
        self._layouts = values[0].layout, values[1].layout
        self.are_maps = all(layout is None or layout.is_map for layout in self._layouts)
        # Of windows, the sizes of the map that they are of.
        self.spatial = tuple(value.grid if len(value.shape or ()) > 3 else value.spatial for value in values)
        self.teacher_channels, self.student_channels = values[0].channels, values[1].channels

    @property
    def name(self) -> str:
        """The taps, "teacher -> student"."""
        return f"{self.teacher} -> {self.student}"

    @property
    def margin_norm(self) -> str | None:
        """Path of the teacher's batch norm that the margins come from; None: there is none."""
        return None if self._margin_norm is None else self._margin_norm[0]

    def teacher_margin(self) -> Tensor:
        """Margins (Ct,) from the batch norm, as it is now, before the teacher's value."""
        assert self._margin_norm is not None
        norm = self._margin_norm[1]
        return batchnorm_margin(norm.weight, norm.bias)  # type: ignore[arg-type]

    def maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features with the channels in axis 1 and the student's map size."""
        return align_maps(*self._channels_second(student, teacher), self._sequences(student, teacher))

    def masked_maps(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `maps`, and the positions that count (N, *), from the input's pixels (N, H, W) that do; None: all."""
        if mask is None:
            return *self.maps(student, teacher), None
        both = self._channels_second(student, teacher)
        return align_masked(*both, mask.to(student.device), self._sequences(student, teacher))

    def _channels_second(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.ndim == teacher.ndim == 2:  # pooled: the images of the batch are what a channel varies over
            return student.T[None], teacher.T[None]
        teacher_dim, student_dim = self.channel_dims
        if self.are_maps or self._same_tokens(student, teacher):
            return student.movedim(student_dim, 1), teacher.movedim(teacher_dim, 1)
        teacher_layout, student_layout = self._layouts
        return as_map(student, student_layout, student_dim), as_map(teacher, teacher_layout, teacher_dim)

    def _same_tokens(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether both are as many tokens in the same order: class tokens, too, are then compared."""
        alike = (
            student.ndim == teacher.ndim == 3
            and student.shape[3 - self.channel_dims[1]] == (teacher.shape[3 - self.channel_dims[0]])
        )
        return alike and all(layout is None or layout.in_order for layout in self._layouts)

    def _sequences(self, student: Tensor, teacher: Tensor) -> bool:
        """Of (N, T, C) and (N, C, L), the first are tokens of an image, the second a sequence."""
        return student.ndim == teacher.ndim == 3 and self.channel_dims == (1, 1)

    def loss(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of features, a scalar in the graph of the student's.

        Args:
            student: the student's value, as it was tapped.
            teacher: the teacher's.
            loss_reduction: "sum" over the elements, or their "mean".
            mask: pixels of the input that belong to an image (N, H, W), bool, True: elements elsewhere are left out;
                None: all pixels do.
        """
        raise NotImplementedError

    def forward(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss; as the module's call, it is what ``position.compile(dynamic=True)`` compiles."""
        return self.loss(student, teacher, loss_reduction, mask)

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, and the share of the student's body that the position guides."""
        teacher_size, student_size = self.spatial
        sizes = f"{self.teacher_channels} x {teacher_size} -> {self.student_channels} x {student_size}"
        return f"{self.name}, {sizes}, {self.guided_share:.0%} of the body"


class Reduced(NamedTuple):
    """A teacher's value that has been reduced to what a position's loss compares with (N, Cs, H, W)."""

    target: Tensor


class MatchedPosition(FeaturePosition):
    """One distillation position: its taps, its matching and margins (buffers), and the student-side normalisation.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the teacher's batch norm that gives the margins; None: they are measured.
        options: the reduction, the normalisation, the matcher and the hysteresis.

    Attributes:
        index: matched teacher channels (Cs, G), -1 for a student channel without any.
        margin: the margins of the student channels (Cs,).
        norm: the normalisation of the student's features.
        matching: the last matching, to look at; None before the first refresh.
    """

    index: Tensor
    margin: Tensor
    signature: Tensor

    def __init__(
        self,
        teacher: Tap,
        student: Tap,
        values: tuple[Operation, Operation],
        margin_norm: tuple[str, nn.Module] | None,
        options: MatchingOptions,
    ) -> None:
        super().__init__(teacher, student, values, margin_norm)
        self.reduction, self.matcher, self.hysteresis = options.reduction, options.matcher, options.hysteresis
        group = 1 if self.rule.one_to_one else max(1, self.teacher_channels // self.student_channels)
        self.register_buffer("index", torch.full((self.student_channels, group), -1))
        self.register_buffer("margin", torch.zeros(self.student_channels))
        # Of what a state was saved for; a number, so that a state holds tensors alone.
        own = f"{self.name} {self.reduction if isinstance(self.reduction, str) else 'own'}"
        self.register_buffer("signature", torch.tensor(zlib.crc32(own.encode())))
        self.register_load_state_dict_pre_hook(_check_signature)  # type: ignore[no-untyped-call]
        try:
            self.norm = options.norm(self.student_channels)
        except Exception as error:  # user code can fail in every way
            raise ValueError(
                f"norm fails for {self.student_channels} channels: {cause(error)}. Expected a function of their number that "
                "makes a module, such as nn.BatchNorm2d"
            ) from error
        self.matching: Matching | None = None

    @property
    def rule(self) -> Reduction:
        """The reduction; by name where it has one, as not every function can be pickled."""
        return get_reduction(self.reduction)

    def loss(
        self,
        student: Tensor,
        teacher: Tensor | Reduced,
        loss_reduction: Literal["sum", "mean"],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The partial loss of features as they were tapped, a scalar; the teacher's may be `Reduced`."""
        student, target, margin, mask = self.loss_arguments(student, teacher, mask)
        return partial_loss(student, target, margin, loss_reduction, mask)

    def loss_arguments(
        self, student: Tensor, teacher: Tensor | Reduced, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of `partial_loss`, from features as they were tapped.

        Args:
            student: the student's value.
            teacher: the teacher's, which may be `Reduced`.
            mask: pixels of the input that belong to an image (N, H, W), bool; None: all.

        Returns:
            Normalised student features and the target, both (N, C, *) for the C student channels that are guided, their
            margins (C,), and the positions that count (N, *).
        """
        if isinstance(teacher, Reduced):
            target = teacher.target
            student = student.movedim(self.channel_dims[1], 1)
            mask = None if mask is None else align_mask(mask.to(student.device), student.shape[2:])
        else:
            student, teacher, mask = self.masked_maps(student, teacher.detach(), mask)
            # What follows reads both in one order.
            target = self.target(teacher.contiguous() if student.is_contiguous() else teacher)
        student, margin = self.norm(masked(student, mask)), self.margin
        if (guided := self.guided()) is not None:
            student, margin = student.index_select(1, guided), margin[guided]
        return student, target, margin, mask

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

    @property
    def reduces_early(self) -> bool:
        """Whether the teacher's value can be reduced as it comes: maps of the student's size, and nothing is drawn."""
        plain = self.channel_dims == (1, 1) and self.spatial[0] == self.spatial[1] and len(self.spatial[0]) == 2
        return plain and self.are_maps and self.rule.deterministic

    def accumulator(self) -> CostAccumulator:
        """What adds up costs, and margins where they are measured, for `solve`."""
        return CostAccumulator(margins=self.margin_norm is None)

    def over_ranks(self, sums: CostAccumulator) -> CostAccumulator:
        """The sums over the images of all ranks."""
        if rank_and_world()[1] == 1:
            return sums
        return sums.over_ranks(self.student_channels, self.teacher_channels, self.index.device)

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

    def solve(self, sums: CostAccumulator) -> Matching:
        """Match by the summed costs and take the margins from the teacher as it is now.

        Raises:
            ValueError: a cost that is not finite; the position is named.
        """
        cost = sums.compute()
        index = from_rank_0(self.assignment(cost))  # random choices must not differ, of margins too
        changed = churn(self.index, index, self.teacher_channels) if is_guided(self.index).any() else None
        margin = sums.margin() if self.margin_norm is None else self.teacher_margin()
        self.index.copy_(index)
        self.margin.copy_(from_rank_0(reduce_margin(margin.to(index.device), index, self.rule)))
        # Kept until the next refresh: in float64 it would be the largest thing that a step holds beside the networks.
        self.matching = Matching(self.name, index, cost.float(), sums.count, changed)
        return self.matching

    def _sticky(self, cost: Tensor) -> Tensor:
        """The cost (Cs, Ct), lowered by the hysteresis for the pairs in force."""
        lower = -self.hysteresis * (self.index >= 0).to(cost)
        return cost.scatter_add(1, self.index.clamp_min(0), lower) if self.hysteresis else cost

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, group size and where the margins come from."""
        margins = f"from {self.margin_norm}" if self.margin_norm else "measured"
        return f"{super().extra_repr()}, groups of {self.index.shape[1]}, margins {margins}"


def _check_signature(position: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}signature")
    if saved is not None and int(saved) != int(cast("Tensor", position.signature)):
        raise ValueError(
            f"the state was saved for other taps or another reduction than position {position.name}: "
            "make the distiller with the taps and the reduction of the saved one"
        )

"""A position whose targets are found anew at each refresh, and not trained.

Axes: N batch, C channels, Cs student channels, Ct teacher channels, M of them, * position axes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from matchdistill.alignment import align_mask
from matchdistill.distributed import rank_and_world
from matchdistill.losses import masked, partial_loss
from matchdistill.matching import FeatureSums, Matching
from matchdistill.messages import cause
from matchdistill.options import MatchingOptions
from matchdistill.position import FeaturePosition
from matchdistill.taps import Tap
from matchdistill.trace import Operation

Sums = TypeVar("Sums", bound=FeatureSums)


class Reduced(NamedTuple):
    """A teacher's value that has been reduced to what a position's loss compares with (N, Cs, H, W)."""

    target: Tensor


class RefreshedPosition(FeaturePosition):
    """A position whose targets have the student's width and follow from what a refresh sums up, without anything trained.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the teacher's batch norm that gives the margins; None: they are measured.
        options: the reduction, the normalisation, the matcher and the hysteresis.

    Attributes:
        margin: the margins of the student channels (Cs,).
        norm: the normalisation of the student's features.
        matching: what the last refresh found, to look at; None before the first one.
    """

    # What is said of a matching: what student channels are paired with, and which members of a target come first.
    partners = "teacher channels"
    first_members = "most similar"

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
        self.reduction = options.reduction
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
    def has_matching(self) -> bool:
        """Whether a refresh, or a loaded state, has told what the targets are."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """How many teacher channels each target is made of."""
        raise NotImplementedError

    @property
    def deterministic(self) -> bool:
        """Whether the targets of the same values are always the same."""
        return True

    def target(self, teacher: Tensor) -> Tensor:
        """The target maps (N, C, *) of the guided student channels, from the teacher's (N, Ct, *)."""
        raise NotImplementedError

    def guided(self) -> Tensor | None:
        """The student channels that have a target, where not all have one; None: all have."""
        return None

    def accumulator(self) -> FeatureSums:
        """What adds up images for `solve`."""
        raise NotImplementedError

    def solve(self, sums: Any) -> Matching:
        """Find the targets and their margins by the sums over all images, of an `accumulator`.

        Raises:
            ValueError: sums that are not finite; the position is named.
        """
        raise NotImplementedError

    def regret(self, halves: Sequence[Any]) -> float:
        """What the sums over half of the images lack, as a share of the objective: see `matching.regret`."""
        raise NotImplementedError

    def found(self, sums: Any) -> Matching:
        """How well the targets in force fit the images of the sums."""
        raise NotImplementedError

    def members(self, channels: Tensor, fit: Matching, most: int) -> Tensor:
        """The teacher channels (M, at most `most`) that the targets of student channels (M,) are made of, the best first.

        Args:
            channels: numbers of student channels that have a target.
            fit: what `found` says of the images that the channels are shown with.
            most: how many are wanted.
        """
        raise NotImplementedError

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

    @property
    def reduces_early(self) -> bool:
        """Whether the teacher's value can be reduced as it comes: maps of the student's size, and nothing is drawn."""
        plain = self.channel_dims == (1, 1) and self.spatial[0] == self.spatial[1] and len(self.spatial[0]) == 2
        return plain and self.are_maps and self.deterministic

    def over_ranks(self, sums: Sums) -> Sums:
        """The sums over the images of all ranks."""
        if rank_and_world()[1] == 1:
            return sums
        return sums.over_ranks(self.student_channels, self.teacher_channels, self.margin.device)


def _check_signature(position: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}signature")
    if saved is not None and int(saved) != int(cast("Tensor", position.signature)):
        raise ValueError(
            f"the state was saved for other taps or another reduction than position {position.name}: "
            "make the distiller with the taps and the reduction of the saved one"
        )

"""The distiller: a student, its frozen teacher, and what ties their features together.

Axes: N batch, Cs student channels, Ct teacher channels, G group, * position axes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from matchdistill.alignment import align_mask, channels_second
from matchdistill.capture import Captured
from matchdistill.distributed import from_rank_0, is_sharded, rank_and_world
from matchdistill.features import FeatureDistiller, FeatureNorm, FeaturePosition, amount
from matchdistill.functional import is_guided, partial_loss, reduce_groups, reduce_margin, solve_assignment
from matchdistill.masking import masked
from matchdistill.matching import CostAccumulator, Matching, churn, regret
from matchdistill.messages import cause
from matchdistill.prepare import Preparation
from matchdistill.probing import evaluating
from matchdistill.reduction import Reduction, get_reduction
from matchdistill.refresh import check_loader, doublings, images_of
from matchdistill.taps import Tap
from matchdistill.trace import Operation

Matcher = Callable[[Tensor, int], Tensor]

FIRST_CHECK = (
    240  # images, of a refresh with a tolerance; its fourth doubling is less than a fifth of the default's 20,000
)


class Reduced(NamedTuple):
    """A teacher's value that has been reduced to what a position's loss compares with (N, Cs, H, W)."""

    target: Tensor


class Position(FeaturePosition):
    """One distillation position: its taps, its matching and margins (buffers), and the student-side normalisation.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the teacher's batch norm that gives the margins; None: they are measured.
        reduction: how matched channels are reduced, by name or a `Reduction`.
        norm: builds the normalisation from the number of channels.
        matcher: solves a matching, (cost (Cs, Ct), G) -> index (Cs, G).
        hysteresis: how much the cost of the pairs in force is lowered.
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
        reduction: str | Reduction,
        norm: Callable[[int], nn.Module],
        matcher: Matcher,
        hysteresis: float,
    ) -> None:
        super().__init__(teacher, student, values, margin_norm)
        self.reduction, self.matcher, self.hysteresis = reduction, matcher, hysteresis
        group = 1 if self.rule.one_to_one else max(1, self.teacher_channels // self.student_channels)
        self.register_buffer("index", torch.full((self.student_channels, group), -1))
        self.register_buffer("margin", torch.zeros(self.student_channels))
        # Of what a state was saved for; a number, so that a state holds tensors alone.
        own = f"{self.name} {reduction if isinstance(reduction, str) else 'own'}"
        self.register_buffer("signature", torch.tensor(zlib.crc32(own.encode())))
        self.register_load_state_dict_pre_hook(_check_signature)  # type: ignore[no-untyped-call]
        try:
            self.norm = norm(self.student_channels)
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
        self, student: Tensor, teacher: Tensor | Reduced, reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The partial loss of features as they were tapped, a scalar; the teacher's may be `Reduced`."""
        student, target, margin, mask = self.compared(student, teacher, mask)
        return partial_loss(student, target, margin, reduction, mask)

    def compared(
        self, student: Tensor, teacher: Tensor | Reduced, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the partial loss compares, of features as they were tapped and the input's pixels that count.

        Returns:
            Normalised student features and the target, both (N, C, *) for the C student channels that are guided, their
            margins (C,), and the positions that count (N, *).
        """
        if isinstance(teacher, Reduced):
            target = teacher.target
            student = channels_second(student, self.channel_dims[1])
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
        """The teacher's maps (N, Ct, *) reduced to those of the student channels that have a partner."""
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

    def matched(self, cost: Tensor) -> Tensor:
        """The matching (Cs, G) of a cost (Cs, Ct).

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
        index = from_rank_0(self.matched(cost))  # random choices, as of "rd"'s margins too, must not differ
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


class MatchingDistiller(FeatureDistiller):
    """Distils a teacher into a student by matching their channels.

    K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020. Neither network is changed: the features are taken
    by hooks (`release` removes them), and ``distiller.student`` is the network to deploy. The teacher stays in evaluation
    mode, gets no gradients, and is in neither ``parameters()`` nor ``state_dict()``.

    Args:
        teacher: the wide network, or the part of one that corresponds to the student.
        student: the narrow network, or a part of one.
        taps: "auto" (see `find_taps`), or pairs (teacher tap, student tap) from shallow to deep, each a `Tap` or its text
            "path:input" / "path:output" / "path". Positions that are left out are not guided.
        reduction: "amp" (absolute max pooling), "rd" (random drop), "sm" (sparse matching, one to one), "max", "mean", or
            a `Reduction`. "rd" draws from torch's default generator, as dropout does.
        loss_weight: weight of each position's mean loss per element, one for all or one for each. "paper" is the paper's
            form: the sum over all elements, divided by ``B * 1e4 * 2 ** (n - 1 - i)`` for batch size B and position i of
            n; made for 224 px, where for MobileNet-V1 it equals 5 times the mean.
        norm: builds the normalisation that student features pass, from the number of channels; default: batch norm.
            `features.group_norm` is for small batches. Statistics of a masked batch count the padding as zeros.
        matcher: solves the matching, (cost (Cs, Ct), G) -> index (Cs, G); `random_assignment` is the control that ignores
            the cost.
        hysteresis: how much the cost of the pairs in force (0 alike, 2 unrelated) is lowered at a refresh, so that only
            what pays changes; 0 is the paper's.
        example: an input to find taps and sizes with; None: images of the size that the networks ask for.
        loss_reduction: "mean", or "sum": the weights are of each position's sum over the elements of an image, which the
            batch's sum divided by B is the mean of. The paper's form for detectors, of four positions, is "sum" with
            ``loss_weight=[2e-8, 2e-8, 2e-7, 2e-7]``.
        prepare: makes the copy of the teacher that runs faster than it and is run in its place, given the copy and what can
            be folded in it: `prepare.prepared`, for other types and compilation in a `functools.partial`; None: the
            teacher itself runs. Weights loaded into the teacher later take effect.
        online: steps in training mode between those whose own features are added up for a `refresh` without images of its
            own; 0: none are. An attribute too, which may be changed. Not with DataParallel.

    Attributes:
        student: the student, as it was given.
        positions: the positions, from shallow to deep; each has `index`, `margin`, `norm` and the last `matching`.
        position_losses: each position's weighted loss in the last forward pass (n,), detached.

    Raises:
        ValueError: taps that do not exist or cannot be found, or weights that do not fit them.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> def network(width):
        ...     return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        >>> distiller = MatchingDistiller(network(8), network(4))
        >>> images = torch.rand(16, 3, 4, 4)
        >>> _ = distiller.refresh([images])
        >>> output, loss = distiller(images)
        >>> output.shape, loss.item() > 0
        (torch.Size([16, 16]), True)
    """

    positions: Sequence[Position]

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Literal["auto"] | Sequence[tuple[Tap | str, Tap | str]] = "auto",
        reduction: str | Reduction = "amp",
        loss_weight: float | Sequence[float] | Literal["paper"] = 5.0,
        norm: Callable[[int], nn.Module] = FeatureNorm,
        matcher: Matcher = solve_assignment,
        hysteresis: float = 0.0,
        example: Tensor | tuple[Any, ...] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        prepare: Preparation | None = None,
        online: int = 0,
    ) -> None:
        get_reduction(reduction)
        if not isinstance(online, int) or online < 0:
            raise ValueError(f"online={online!r}: expected a number of steps, or 0")
        if not amount(hysteresis):
            raise ValueError(f"hysteresis={hysteresis}: expected a finite number of at least 0")

        position = functools.partial(Position, reduction=reduction, norm=norm, matcher=matcher, hysteresis=hysteresis)
        super().__init__(teacher, student, taps, position, loss_weight, example, loss_reduction, prepare)
        self.matched = False
        self.online = online
        self.forget()
        self.register_load_state_dict_post_hook(_look_for_matching)  # type: ignore[no-untyped-call]

    def loss(self, captured: Captured, mask: Tensor | None = None) -> Tensor:
        """As of `FeatureDistiller`.

        Raises:
            RuntimeError: before the first `refresh`.
            ValueError: as of `FeatureDistiller`.
        """
        if not self.matched:
            raise RuntimeError("there is no matching yet: call distiller.refresh(loader) before training")
        if self.online and self.training:
            if getattr(self, "_is_replica", False):
                raise ValueError(
                    "online: the replicas of DataParallel cannot add up their features; use one process for each GPU"
                )
            if self._adds_up():
                self.add_up(captured, mask, self._seen)
            self._steps += 1
        values = self.teacher_values(captured)
        for number, value in values.items():
            if isinstance(value, Reduced) and value.target.shape[2:] != captured.values[number].shape[2:]:
                captured.teacher_values = self._teacher(captured)  # sizes that differ at this input alone
                break
        return super().loss(captured, mask)

    def teacher_values(self, captured: Captured) -> dict[int, Any]:
        """As of `FeatureDistiller`; for the loss alone, what the teacher goes on to change is reduced rather than copied."""
        if captured.teacher_values is None and self.matched and not self._adds_up():
            captured.teacher_values = self._teacher(captured, self._reduced)
        return super().teacher_values(captured)

    def _reduced(self, number: int, value: Tensor) -> Tensor | Reduced:
        position = self.positions[number]
        return Reduced(position.target(value)) if position.reduces_early else value.clone()

    def _adds_up(self) -> bool:
        """Whether the features of this step are added up for a refresh."""
        return self.online > 0 and self.training and self._steps % self.online == 0

    def forget(self) -> None:
        """Begin anew with the features that training steps add up for a refresh without images of its own."""
        self._steps = 0
        self._seen = [position.accumulator() for position in self.positions]

    @torch.no_grad()
    def refresh(
        self,
        loader: Iterable[Any] | None = None,
        max_images: int = 20_000,
        forward: Callable[[Any], Any] | None = None,
        tolerance: float | None = None,
    ) -> list[Matching]:
        """Solve the matching anew, and take the margins, over images of the training set (sections 3.1 and 3.2).

        Both networks run in evaluation mode. In a `torch.distributed` run every rank calls this and runs its share of the
        images; the costs are added up, so that all ranks get the matching of one process over all of the images.

        Args:
            loader: batches; the first tensor with at least three axes holds the images, without such the first one. If the
                loader deals the images out to the ranks (by a `DistributedSampler`, or as Accelerate has prepared it) it is
                used whole, else each rank takes every world-th batch. None: no image is run, the costs are those of the
                training steps since the last refresh (or `forget`), for distillers made with `online`.
            max_images: the most images, over all ranks; with `forward`, up to the end of a batch.
            forward: runs the student on a batch, for students that are parts of larger models, which then see whole
                batches; None: ``student(images)``. A bool tensor that it returns is the batch's mask, as of `loss`: the
                padding is left out of costs and margins. Whatever else it returns is ignored.
            tolerance: stop as soon as more images would lower the objective, the mean cost of the matched pairs, by no more
                than this share of it, 0.001 say. At 240 images and each doubling, the matching of either half of the
                batches so far is tried on the other (see `matching.regret`). None: take `max_images`.

        Returns:
            The matching of every position; its `images` says how many it took.

        Raises:
            ValueError: no images, costs that are not finite, or a mask that does not fit.
        """
        if loader is None:
            return self._solve([self._seen])
        check_loader(loader)
        if not isinstance(max_images, int) or max_images < 1:
            raise ValueError(f"max_images={max_images!r}: expected at least 1, a whole number")
        if tolerance is not None and not amount(tolerance):
            raise ValueError(f"tolerance={tolerance}: expected a share of the objective, 0 or more, or None")
        rank, world = rank_and_world()
        halves = [[position.accumulator() for position in self.positions] for _ in range(1 if tolerance is None else 2)]
        checks = [] if tolerance is None else doublings(FIRST_CHECK, max_images)
        self._teacher.look_again()  # weights may have been loaded into it since
        sharded = world == 1 or is_sharded(loader)
        # Images left to this rank; to all of them where the other ranks' batches can be counted as they pass by.
        own = sharded or forward is not None
        left = len(range(rank, max_images, world)) if own else max_images
        seen = batches = 0  # of all ranks, about; of this one
        settled = False
        with evaluating(self.student):
            for number, batch in enumerate(loader if left > 0 else ()):
                count = min(left, len(images_of(batch))) if forward is None else 0
                if sharded or number % world == rank:
                    captured, mask = self.run(batch, forward, count)
                    if world == 1:  # synchronised batch norms would wait for ranks that have no batch
                        self.compare_modes(captured)
                    self.add_up(captured, mask, halves[batches % len(halves)])
                    count = len(captured.values[0])
                    batches += 1
                left -= count
                seen += count * (world if own else 1)
                if left <= 0:  # before another batch is loaded
                    break
                while checks and seen >= checks[0] and not settled:
                    settled = self._settled(halves, checks, tolerance)
                if settled:
                    break
        while checks and world > 1 and not settled:  # the other ranks may have more images
            settled = self._settled(halves, checks, tolerance)
        return self._solve(halves)

    def add_up(self, captured: Captured, mask: Tensor | None, sums: Sequence[CostAccumulator]) -> None:
        """Add the features of a pass, of the student's and the teacher's values as they were captured, to the sums."""
        values = self.teacher_values(captured)
        for place, (position, total) in enumerate(zip(self.positions, sums, strict=True)):
            total.update(*position.masked_maps(captured.values[place], values[place], mask))

    def run(
        self, batch: Any, forward: Callable[[Any], Any] | None = None, count: int | None = None
    ) -> tuple[Captured, Tensor | None]:
        """Run both networks, in their present modes, on a batch.

        Args:
            batch: as of `refresh`.
            forward: as of `refresh`.
            count: so many of the batch's images at most, without `forward`.

        Returns:
            What was captured, the teacher's values with it, and the batch's mask.
        """
        mask = None
        with self.capture() as captured:
            if forward is None:
                images = images_of(batch)[:count].to(self.positions[0].index.device, non_blocking=True)
                self._run_student(images)
            else:
                returned = forward(batch)
                mask = returned if isinstance(returned, Tensor) and returned.dtype == torch.bool else None
        captured.teacher_values = self._teacher(captured)
        return captured, mask

    def _run_student(self, images: Tensor) -> None:
        try:
            self.student(images)
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the student does not take what a batch seems to hold as images, {tuple(images.shape)} of {images.dtype}: "
                f"{cause(error)}. Give forward=, which runs the student on a batch"
            ) from error

    def _settled(self, halves: Sequence[Sequence[CostAccumulator]], checks: list[int], tolerance: float | None) -> bool:
        """Whether the images so far are enough, at the first of the checks, which every rank has come to."""
        assert tolerance is not None
        del checks[0]
        for place, position in enumerate(self.positions):
            sums = [position.over_ranks(half[place]) for half in halves]
            counts = [total.count for total in sums]
            if not all(counts) or (checks and sum(counts) >= checks[0]):  # which is next to be looked at
                return False
            found = regret([total.compute() for total in sums], position.matched)
            if from_rank_0(torch.tensor(found, device=position.index.device)) > tolerance:
                return False
        return True

    def _solve(self, parts: Sequence[Sequence[CostAccumulator]]) -> list[Matching]:
        """The matchings by the sums over all parts of the images and over all ranks."""
        totals = [sum(rest, first) for first, *rest in zip(*parts, strict=True)]
        pairs = zip(self.positions, totals, strict=True)
        matchings = [position.solve(position.over_ranks(total)) for position, total in pairs]
        self.matched = True
        self.forget()
        return matchings


def _check_signature(position: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}signature")
    if saved is not None and int(saved) != int(cast("Tensor", position.signature)):
        raise ValueError(
            f"the state was saved for other taps or another reduction than position {position.name}: "
            "make the distiller with the taps and the reduction of the saved one"
        )


def _look_for_matching(distiller: nn.Module, _: Any) -> None:
    distiller.matched = all(bool(is_guided(position.index).any()) for position in distiller.positions)  # type: ignore

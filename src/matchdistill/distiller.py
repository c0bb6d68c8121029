"""The distiller: a student, its frozen teacher, and what ties their features together.

Axes: N batch, Cs student channels, Ct teacher channels, G group, * position axes.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from matchdistill.capture import Captured
from matchdistill.features import FeatureDistiller, FeatureNorm, FeaturePosition
from matchdistill.functional import masked, partial_loss, reduce_margin, solve_assignment
from matchdistill.matching import CostAccumulator, Matching, churn
from matchdistill.reduction import Reduction, get_reduction
from matchdistill.refresh import from_rank_0, images_of, is_sharded, rank_and_world
from matchdistill.taps import Tap
from matchdistill.trace import Operation, evaluating

Matcher = Callable[[Tensor, int], Tensor]


class Position(FeaturePosition):
    """One distillation position: its taps, its matching and margins (buffers), and the student-side normalisation.

    Args:
        teacher, student: the taps.
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
        self.norm = norm(self.student_channels)
        self.matching: Matching | None = None

    @property
    def rule(self) -> Reduction:
        """The reduction; by name where it has one, as not every function can be pickled."""
        return get_reduction(self.reduction)

    def loss(
        self, student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The partial loss of features as they were tapped, a scalar."""
        student, teacher, mask = self.masked_maps(student, teacher.detach(), mask)
        student, index, margin = self.norm(masked(student, mask)), self.index, self.margin
        if self.teacher_channels < self.student_channels:
            # Only the Ct student channels with a partner are guided; a stable sort finds them without asking the device.
            guided = (index[:, 0] < 0).to(torch.uint8).argsort(stable=True)[: self.teacher_channels]
            student, index, margin = student.index_select(1, guided), index[guided], margin[guided]
        with torch.no_grad():
            target = self.rule.channels(teacher, index, None)
        return partial_loss(student, target, margin, reduction, mask)

    def solve(self, sums: CostAccumulator) -> Matching:
        """Match by the summed costs and take the margins from the teacher as it is now.

        Raises:
            ValueError: a cost that is not finite; the position is named.
        """
        cost = sums.compute()
        try:
            index = self.matcher(self._sticky(cost), self.index.shape[1]).to(self.index.device)
        except ValueError as error:
            raise ValueError(f"position {self.name}: {error}") from error
        index = from_rank_0(index)  # random choices, as of "rd"'s margins too, must not differ
        changed = churn(self.index, index, self.teacher_channels) if (self.index >= 0).any() else None
        margin = sums.margin() if self.margin_norm is None else self.teacher_margin()
        self.index.copy_(index)
        self.margin.copy_(from_rank_0(reduce_margin(margin.to(index.device), index, self.rule)))
        self.matching = Matching(self.name, index, cost, sums.count, changed)
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

    Attributes:
        student: the student, as it was given.
        positions: the positions, from shallow to deep; each has `index`, `margin`, `norm` and the last `matching`.
        position_losses: each position's weighted loss in the last forward pass (n,), detached.

    Raises:
        ValueError: taps that do not exist or cannot be found, or weights that do not fit them.

    Example:
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
    ) -> None:
        get_reduction(reduction)
        if not 0 <= hysteresis < math.inf:
            raise ValueError(f"hysteresis={hysteresis}: expected a finite number of at least 0")

        position = functools.partial(Position, reduction=reduction, norm=norm, matcher=matcher, hysteresis=hysteresis)
        super().__init__(teacher, student, taps, position, loss_weight, example, loss_reduction)
        self.matched = False
        self.register_load_state_dict_post_hook(_look_for_matching)  # type: ignore[no-untyped-call]

    def loss(self, captured: Captured, mask: Tensor | None = None) -> Tensor:
        """As of `FeatureDistiller`.

        Raises:
            RuntimeError: before the first `refresh`.
            ValueError: as of `FeatureDistiller`.
        """
        if not self.matched:
            raise RuntimeError("there is no matching yet: call distiller.refresh(loader) before training")
        return super().loss(captured, mask)

    @torch.no_grad()
    def refresh(
        self,
        loader: Iterable[Any],
        max_images: int = 20_000,
        forward: Callable[[Any], Any] | None = None,
    ) -> list[Matching]:
        """Solve the matching anew, and take the margins, over images of the training set (sections 3.1 and 3.2).

        Both networks run in evaluation mode. In a `torch.distributed` run every rank calls this and runs its share of the
        images; the costs are added up, so that all ranks get the matching of one process over all of the images.

        Args:
            loader: batches; the first tensor of each holds the images. If its sampler deals the images out to the ranks
                (`DistributedSampler`) it is used whole, else each rank takes every world-th batch.
            max_images: the most images, over all ranks; with `forward`, up to the end of a batch.
            forward: runs the student on a batch, for students that are parts of larger models, which then see whole
                batches; None: ``student(images)``. A bool tensor that it returns is the batch's mask, as of `loss`: the
                padding is left out of costs and margins. Whatever else it returns is ignored.

        Returns:
            The matching of every position.

        Raises:
            ValueError: no images, costs that are not finite, or a mask that does not fit.
        """
        if max_images < 1:
            raise ValueError(f"max_images={max_images}: expected at least 1")
        rank, world = rank_and_world()
        device = self.positions[0].index.device
        sums = [CostAccumulator() for _ in self.positions]
        self._teacher.copies.clear()  # weights may have been loaded into it since
        sharded = world == 1 or is_sharded(loader)
        # Images left to this rank; to all of them where the other ranks' batches can be counted as they pass by.
        own = sharded or forward is not None
        left = len(range(rank, max_images, world)) if own else max_images
        with evaluating(self.student):
            for number, batch in enumerate(loader if left > 0 else ()):
                count = min(left, len(images_of(batch))) if forward is None else 0
                if sharded or number % world == rank:
                    mask = None
                    with self.capture() as captured:
                        if forward is None:
                            self.student(images_of(batch)[:count].to(device))
                        else:
                            returned = forward(batch)
                            mask = returned if isinstance(returned, Tensor) and returned.dtype == torch.bool else None
                    teacher_values = self._teacher(captured)
                    for place, position in enumerate(self.positions):
                        sums[place].update(*position.masked_maps(captured.values[place], teacher_values[place], mask))
                    count = len(captured.values[0])
                left -= count
                if left <= 0:  # before another batch is loaded
                    break
        if world > 1:
            for total, position in zip(sums, self.positions, strict=True):
                total.all_reduce(position.student_channels, position.teacher_channels, device)
        matchings = [position.solve(total) for total, position in zip(sums, self.positions, strict=True)]
        self.matched = True
        return matchings


def _check_signature(position: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}signature")
    if saved is not None and int(saved) != int(cast("Tensor", position.signature)):
        raise ValueError(
            f"the state was saved for other taps or another reduction than position {position.name}: "
            "make the distiller with the taps and the reduction of the saved one"
        )


def _look_for_matching(distiller: nn.Module, _: Any) -> None:
    distiller.matched = all(bool((position.index >= 0).any()) for position in distiller.positions)  # type: ignore

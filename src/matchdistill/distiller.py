"""The distiller by matching: groups of the frozen teacher's channels guide the channels of a student.

Axes: N batch, Cs student channels, Ct teacher channels, G group, * position axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.aligned import AlignedPosition
from matchdistill.capture import Captured
from matchdistill.distributed import from_rank_0
from matchdistill.features import FeatureDistiller
from matchdistill.matched import MatchedPosition
from matchdistill.matching import FeatureSums, Matching
from matchdistill.messages import cause
from matchdistill.options import MatchingOptions, Taps
from matchdistill.probing import evaluating
from matchdistill.reduction import ALIGN, Reduction
from matchdistill.refresh import RankBatches, images_of
from matchdistill.refreshed import Reduced, RefreshedPosition


class MatchingDistiller(FeatureDistiller):
    """Distils a teacher into a student by matching their channels.

    K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020. Neither network is changed: the features are taken
    by hooks (`release` removes them), and ``distiller.student`` is the network to deploy. The teacher stays in evaluation
    mode, gets no gradients, and is in neither ``parameters()`` nor ``state_dict()``.

    Args:
        teacher: the wide network, or the part of one that corresponds to the student.
        student: the narrow network, or a part of one.
        taps: "auto", or pairs (teacher tap, student tap) from shallow to deep.
        reduction: how a group of teacher channels becomes one target channel: "amp", "rd", "sm", "max", "mean", or a
            `Reduction`; or "align", by which each target is made of all of them.
        options: further fields of `MatchingOptions`, which documents each of them: loss_weight, norm, matcher, hysteresis,
            example, loss_reduction, prepare, online.

    Attributes:
        student: the student, as it was given.
        positions: the positions, from shallow to deep; each has `index`, `margin`, `norm` and the last `matching`.
        position_losses: each position's weighted loss in the last forward pass (n,), detached.
        has_matching: whether there is a matching, from a `refresh` or a loaded state.
        online: steps in training mode from one whose features are added up for the next refresh to another; 0: none are.

    Raises:
        TypeError: an unknown option, or what is no network.
        ValueError: taps that do not exist or cannot be found, weights that do not fit them, or options out of range.

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

    positions: Sequence[RefreshedPosition]

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Taps = "auto",
        reduction: str | Reduction = "amp",
        **options: Any,
    ) -> None:
        checked = MatchingOptions.of(taps=taps, reduction=reduction, **options)
        position = functools.partial(AlignedPosition if reduction == ALIGN else MatchedPosition, options=checked)
        super().__init__(teacher, student, position=position, **checked.of_features())
        self.has_matching = False
        self.online = checked.online
        self.forget()
        self.register_load_state_dict_post_hook(_look_for_matching)  # type: ignore[no-untyped-call]

    def _check_ready(self) -> None:
        if not self.has_matching:
            raise RuntimeError("there is no matching yet: call distiller.refresh(loader) before training")
        if self.online and self.training and getattr(self, "_is_replica", False):
            raise ValueError(
                "online: the replicas of DataParallel cannot add up their features; use one process for each GPU"
            )

    def _early_use(self) -> Callable[[int, Tensor], Any] | None:
        """Reduce values for the loss, except in a step that adds them up for a refresh: that needs whole ones."""
        return self._reduce_early if self.has_matching and not self._adds_up() else None

    def _reduce_early(self, number: int, value: Tensor) -> Tensor | Reduced:
        position = self.positions[number]
        return Reduced(position.target(value)) if position.reduces_early else value.clone()

    def _fit(self, captured: Captured, values: dict[int, Any]) -> bool:
        """Whether reduced values have the student's map sizes: at an input of another size they may differ."""
        return all(
            value.target.shape[2:] == captured.values[number].shape[2:]
            for number, value in values.items()
            if isinstance(value, Reduced)
        )

    def _after_teacher(self, captured: Captured, mask: Tensor | None) -> None:
        """Add up the features of the step for a refresh, if it is its turn."""
        if self._adds_up():
            self.add_up(captured, mask, self._seen)
        if self.online and self.training:
            self._steps += 1

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
            loader: batches. The first tensor with at least three axes holds the images; if there is none, the first
                tensor does. Each rank runs every world-th batch, unless the loader deals the images out itself (by a
                `DistributedSampler`, or prepared by Accelerate). None: no image is run; the costs come from the training
                steps since the last refresh (or `forget`), for distillers made with `online`.
            max_images: the most images, over all ranks; with `forward`, up to the end of a batch.
            forward: runs the student on a batch. Give it for a student that is a part of a larger model, which then sees
                whole batches; None: ``student(images)``. If it returns a bool tensor (N, H, W), True at the pixels of an
                image, costs and margins leave the padding out. Whatever else it returns is ignored.
            tolerance: stop once more images would lower the mean cost of the matched pairs by no more than this share of
                it, for example 0.001. At 240 images and each doubling, the matching of either half of the batches so far
                is tried on the other half (see `matching.regret`). None: take `max_images`.

        Returns:
            The matching of every position; its `images` says how many it took.

        Raises:
            ValueError: no images, costs that are not finite, or a mask that does not fit.
        """
        if loader is None:
            return self._solve([self._seen])
        # Batches in turn: where there is a tolerance, the matchings of both halves are compared.
        halves = [[position.accumulator() for position in self.positions] for _ in range(1 if tolerance is None else 2)]
        settled = functools.partial(self._settled, halves, tolerance)
        batches = RankBatches(loader, max_images, forward is not None, tolerance, settled)
        self._teacher.look_again()  # weights may have been loaded into it since
        with evaluating(self.student):
            for number, batch in enumerate(batches):
                captured, mask = self.run(batch, forward, batches.limit)
                if batches.alone:  # synchronised batch norms would wait for processes that have no batch
                    self.compare_modes(captured)
                self.add_up(captured, mask, halves[number % len(halves)])
                batches.took(len(captured.values[0]))
        return self._solve(halves)

    def add_up(self, captured: Captured, mask: Tensor | None, sums: Sequence[FeatureSums]) -> None:
        """Add the features of a pass, of the student's and the teacher's values as they were captured, to the sums."""
        values = self.teacher_values(captured)
        for place, (position, total) in enumerate(zip(self.positions, sums, strict=True)):
            value = captured.values[place]
            images = len(value) if value.ndim == 2 else None  # pooled: one map of them all
            total.update(*position.masked_maps(value, values[place], mask), images)

    def run(
        self, batch: Any, forward: Callable[[Any], Any] | None = None, count: int | None = None
    ) -> tuple[Captured, Tensor | None]:
        """Run both networks, in their present modes, on a batch.

        Args:
            batch: one of a loader; without `forward`, its first tensor with at least three axes holds the images.
            forward: runs the student on the batch, and may return a mask of the pixels that count (N, H, W), bool.
            count: the most images to run, without `forward`; None: all of them.

        Returns:
            What was captured, with the teacher's values; and the mask, if there is one.
        """
        mask = None
        with self.capture() as captured:
            if forward is None:
                images = images_of(batch)[:count].to(self.positions[0].margin.device, non_blocking=True)
                self._run_student(images)
            else:
                returned = forward(batch)
                mask = returned if isinstance(returned, Tensor) and returned.dtype == torch.bool else None
        self.whole_values(captured)
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

    def _settled(self, halves: Sequence[Sequence[FeatureSums]], tolerance: float | None, next_check: float) -> bool:
        """Whether the images so far are enough; not before a next check that they have come to as well."""
        assert tolerance is not None
        for place, position in enumerate(self.positions):
            sums = [position.over_ranks(half[place]) for half in halves]
            counts = [total.images for total in sums]
            if not all(counts) or sum(counts) >= next_check:
                return False
            if from_rank_0(torch.tensor(position.regret(sums), device=position.margin.device)) > tolerance:
                return False
        return True

    def _solve(self, parts: Sequence[Sequence[FeatureSums]]) -> list[Matching]:
        """Match by the sums over all parts of the images and over all processes."""
        totals = [sum(rest, first) for first, *rest in zip(*parts, strict=True)]
        pairs = zip(self.positions, totals, strict=True)
        matchings = [position.solve(position.over_ranks(total)) for position, total in pairs]
        self.has_matching = True
        self.forget()
        return matchings


def _look_for_matching(distiller: nn.Module, _: Any) -> None:
    assert isinstance(distiller, MatchingDistiller)
    distiller.has_matching = all(position.has_matching for position in distiller.positions)

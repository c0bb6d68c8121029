"""The distiller: a student, its frozen teacher, and what ties their features together.

Axes: N batch, Cs student channels, Ct teacher channels, G group, * position axes.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from matchdistill.alignment import align_maps, channels_second
from matchdistill.capture import Capture, Captured
from matchdistill.functional import batchnorm_margin, partial_loss, reduce_margin, solve_assignment
from matchdistill.matching import CostAccumulator, Matching, churn
from matchdistill.reduction import Reduction, get_reduction
from matchdistill.refresh import images_of, is_sharded, rank_and_world
from matchdistill.taps import Tap, choose, margin_source, resolve, tapped_operation, trace_pair
from matchdistill.teacher import FrozenTeacher
from matchdistill.trace import Operation, evaluating

PAPER_FACTOR = 1e4  # of the summed losses at 224 px (section 4.1)


class FeatureNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of features (N, C, *) with any position axes.

    A batch that leaves a channel a single value has no variance to normalise by; there the running statistics are used.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            assert self.running_mean is not None
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)
        return super().forward(input)


class Position(nn.Module):
    """One distillation position: its taps, its matching and margins (buffers), and the student-side normalisation.

    Args:
        teacher, student: the taps.
        values: the operations that make their values.
        margin_norm: path of the teacher's batch norm that gives the margins; None: they are measured.
        reduction: how matched channels are reduced, by name or a `Reduction`.
        norm: builds the normalisation from the number of channels.
    """

    index: Tensor
    margin: Tensor
    signature: Tensor

    def __init__(
        self,
        teacher: Tap,
        student: Tap,
        values: tuple[Operation, Operation],
        margin_norm: str | None,
        reduction: str | Reduction,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.teacher, self.student, self.margin_norm, self.reduction = teacher, student, margin_norm, reduction
        self.channel_dims = values[0].channels_axis, values[1].channels_axis
        self.spatial = values[0].spatial, values[1].spatial
        self.teacher_channels, self.student_channels = values[0].channels, values[1].channels
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
    def name(self) -> str:
        """The taps, "teacher -> student"."""
        return f"{self.teacher} -> {self.student}"

    @property
    def rule(self) -> Reduction:
        """The reduction; by name where it has one, as not every function can be pickled."""
        return get_reduction(self.reduction)

    def maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features with the channels in axis 1 and the student's map size."""
        # Of (N, T, C) and (N, C, L), the first are tokens of an image, the second a sequence.
        sequences = student.ndim == teacher.ndim == 3 and self.channel_dims == (1, 1)
        student, teacher = (
            channels_second(student, self.channel_dims[1]),
            channels_second(teacher, self.channel_dims[0]),
        )
        return align_maps(student, teacher, sequences)

    def loss(self, student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
        """The partial loss of features as they were tapped, a scalar."""
        student, teacher = self.maps(student, teacher.detach())
        student, index, margin = self.norm(student), self.index, self.margin
        if self.teacher_channels < self.student_channels:
            # Only the Ct student channels with a partner are guided; a stable sort finds them without asking the device.
            guided = (index[:, 0] < 0).to(torch.uint8).argsort(stable=True)[: self.teacher_channels]
            student, index, margin = student.index_select(1, guided), index[guided], margin[guided]
        with torch.no_grad():
            target = self.rule.channels(teacher, index, None)
        return partial_loss(student, target, margin, reduction)

    def solve(self, sums: CostAccumulator, teacher: nn.Module) -> Matching:
        """Match by the summed costs and take the margins from the teacher as it is now.

        Raises:
            ValueError: a cost that is not finite; the position is named.
        """
        cost = sums.compute()
        try:
            index = solve_assignment(cost, self.index.shape[1])
        except ValueError as error:
            raise ValueError(f"position {self.name}: {error}") from error
        changed = churn(self.index.to(index.device), index, self.teacher_channels) if (self.index >= 0).any() else None
        if self.margin_norm is None:
            margin = sums.margin()
        else:
            norm = resolve(teacher, self.margin_norm)
            margin = batchnorm_margin(norm.weight, norm.bias)  # type: ignore[arg-type]
        self.index.copy_(index)
        self.margin.copy_(reduce_margin(margin.to(index.device), index, self.rule))
        self.matching = Matching(self.name, index, cost, sums.count, changed)
        return self.matching

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, group size and where the margins come from."""
        (teacher_size, student_size), group = self.spatial, self.index.shape[1]
        return (
            f"{self.name}, {self.teacher_channels} x {teacher_size} -> {self.student_channels} x {student_size}, "
            f"groups of {group}, margins " + (f"from {self.margin_norm}" if self.margin_norm else "measured")
        )


class MatchingDistiller(nn.Module):
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
        example: an input to find taps and sizes with; None: images of the size that the networks ask for.

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
    position_losses: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Literal["auto"] | Sequence[tuple[Tap | str, Tap | str]] = "auto",
        reduction: str | Reduction = "amp",
        loss_weight: float | Sequence[float] | Literal["paper"] = 5.0,
        norm: Callable[[int], nn.Module] = FeatureNorm,
        example: Tensor | tuple[Any, ...] | None = None,
    ) -> None:
        super().__init__()
        get_reduction(reduction)
        if shared := {id(module) for module in teacher.modules()} & {id(module) for module in student.modules()}:
            path = next(path for path, module in student.named_modules() if id(module) in shared)
            raise ValueError(
                f"teacher and student share the module {path!r}: the frozen teacher needs modules of its own, for example "
                "copy.deepcopy(teacher)"
            )
        traces = trace_pair(teacher, student, example)
        if isinstance(taps, str) and taps != "auto":
            raise ValueError(f"taps={taps!r}: expected 'auto' or a sequence of (teacher tap, student tap)")
        pairs = [(first.tap, second.tap) for first, second in choose(*traces)] if taps == "auto" else _pairs(taps)
        positions = []
        for first, second in pairs:
            values = tapped_operation(traces[0], teacher, first), tapped_operation(traces[1], student, second)
            positions.append(Position(first, second, values, margin_source(traces[0], values[0]), reduction, norm))
        like = next((weight for weight in student.parameters() if weight.is_floating_point()), torch.empty(0))
        modules = nn.ModuleList(positions).to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.positions = cast("Sequence[Position]", modules)
        self._weights, self._loss_reduction = _weights(loss_weight, len(positions))
        self.student = student
        self._student_capture = Capture(student, [position.student for position in positions])
        # Not a submodule: the teacher's weights are neither trained nor saved with the distiller.
        self._teacher = FrozenTeacher(teacher, [position.teacher for position in positions])
        self.matched = False
        self.position_losses = torch.zeros(len(positions))
        self.register_load_state_dict_post_hook(_look_for_matching)  # type: ignore[no-untyped-call]

    @property
    def teacher(self) -> nn.Module:
        """The teacher, as it was given."""
        return self._teacher.model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MatchingDistiller:
        self._teacher.model._apply(fn)  # type: ignore[no-untyped-call]
        self._teacher.copies.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run student and teacher on the same input.

        Returns:
            The student's own output, and the distillation loss: a scalar in the graph.

        Raises:
            RuntimeError: before the first `refresh`.
        """
        with self.capture() as captured:
            output = self.student(*args, **kwargs)
        return output, self.loss(captured)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Captured]:
        """Collect the student's features and input in a block that runs it, for `loss`.

        For a student that is a part of a larger model: run the model in the block.

        Raises:
            ValueError: at the end, if a tap was not reached.
        """
        with self._student_capture() as captured:
            yield captured

    def loss(self, captured: Captured) -> Tensor:
        """Run the teacher on exactly the input that the student had, and return the distillation loss, a scalar."""
        if not self.matched:
            raise RuntimeError("there is no matching yet: call distiller.refresh(loader) before training")
        self._student_capture.check(captured)
        teacher_values = self._teacher(captured)
        # The paper's sums are per image of the batch; means are already.
        share = 1 / len(captured.values[0]) if self._loss_reduction == "sum" else 1.0
        losses = [
            position.loss(captured.values[number], teacher_values[number], self._loss_reduction) * (weight * share)
            for number, (position, weight) in enumerate(zip(self.positions, self._weights, strict=True))
        ]
        self.position_losses = torch.stack(losses).detach()
        return torch.stack(losses).sum()

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
            max_images: the most images, over all ranks.
            forward: runs the student on a batch, for students that are parts of larger models, which then see whole
                batches; None: ``student(images)``.

        Returns:
            The matching of every position.

        Raises:
            ValueError: no images, or costs that are not finite.
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
                    with self.capture() as captured:
                        if forward is None:
                            self.student(images_of(batch)[:count].to(device))
                        else:
                            forward(batch)
                    teacher_values = self._teacher(captured)
                    for place, position in enumerate(self.positions):
                        sums[place].update(*position.maps(captured.values[place], teacher_values[place]))
                    count = len(captured.values[0])
                left -= count
                if left <= 0:  # before another batch is loaded
                    break
        if world > 1:
            for total, position in zip(sums, self.positions, strict=True):
                total.all_reduce(position.student_channels, position.teacher_channels, device)
        matchings = [position.solve(total, self.teacher) for total, position in zip(sums, self.positions, strict=True)]
        if world > 1:
            for position in self.positions:  # "rd" draws a margin, which must not differ between ranks
                torch.distributed.broadcast(position.margin, 0)
        self.matched = True
        return matchings

    def release(self) -> nn.Module:
        """Take the hooks off both networks and return the student; the distiller is of no use afterwards."""
        self._student_capture.remove()
        self._teacher.capture.remove()
        return self.student

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({type(self.teacher).__name__} -> {type(self.student).__name__}"]
        lines += [f"  {number}: {position.extra_repr()}" for number, position in enumerate(self.positions)]
        return "\n".join([*lines, ")"])


def _check_signature(position: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}signature")
    if saved is not None and int(saved) != int(cast("Tensor", position.signature)):
        raise ValueError(
            f"the state was saved for other taps or another reduction than position {position.name}: "
            "make the distiller with the taps and the reduction of the saved one"
        )


def _look_for_matching(distiller: nn.Module, _: Any) -> None:
    distiller.matched = all(bool((position.index >= 0).any()) for position in distiller.positions)  # type: ignore


def _pairs(taps: Sequence[tuple[Tap | str, Tap | str]]) -> list[tuple[Tap, Tap]]:
    """The taps as such; a pair from YAML is a list."""
    pairs: list[tuple[Tap, Tap]] = []
    for pair in taps:
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(tap, (Tap, str)) for tap in pair)
        ):
            raise ValueError(f"{pair!r} in taps: expected a pair (teacher tap, student tap), each a Tap or its text")
        first, second = (tap if isinstance(tap, Tap) else Tap.parse(tap) for tap in pair)
        pairs.append((first, second))
    if not pairs:
        raise ValueError("taps is empty: expected 'auto' or at least one (teacher tap, student tap)")
    return pairs


def _weights(
    loss_weight: float | Sequence[float] | Literal["paper"], positions: int
) -> tuple[list[float], Literal["sum", "mean"]]:
    """The weight of every position, and whether it is of the sum over a position's elements or of their mean."""
    if loss_weight == "paper":
        return [1 / (PAPER_FACTOR * 2 ** (positions - 1 - number)) for number in range(positions)], "sum"
    if isinstance(loss_weight, str):
        raise ValueError(f"loss_weight={loss_weight!r}: expected a number, a number for each position, or 'paper'")
    weights: list[Any] = list(loss_weight) if isinstance(loss_weight, Sequence) else [loss_weight] * positions
    if len(weights) != positions:
        raise ValueError(f"loss_weight has {len(weights)} numbers for {positions} positions: expected one for each")
    if not all(isinstance(weight, numbers.Real) and 0 <= float(weight) < math.inf for weight in weights):
        raise ValueError(f"loss_weight={loss_weight!r}: expected finite numbers of at least 0, one for each position")
    return [float(weight) for weight in weights], "mean"

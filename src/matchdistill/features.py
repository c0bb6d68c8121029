"""What the distillers of features have in common: tapped values of teacher and student, compared position by position.

Axes: N batch, Cs student channels, Ct teacher channels, * position axes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from matchdistill.alignment import align_maps, align_masked, as_map, channels_second
from matchdistill.capture import Capture, Captured
from matchdistill.checks import changed_by_mode, leads_to, modules_before, other_modes_problem, trains_any
from matchdistill.choice import choose, placed, trace_pair
from matchdistill.functional import batchnorm_margin
from matchdistill.prepare import Preparation, foldable
from matchdistill.taps import Tap, margin_source, resolve, tapped_operation
from matchdistill.teacher import FrozenTeacher, shared_modules
from matchdistill.trace import Operation, Trace

PAPER_FACTOR = 1e4  # of the summed losses at 224 px (MGD, section 4.1)


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


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, or of the most that divide both 32 and the channels: for batches of a few images.

    Examples:
        >>> [group_norm(channels).num_groups for channels in (256, 24)]
        [32, 8]
    """
    return nn.GroupNorm(math.gcd(32, channels), channels)


class FeaturePosition(nn.Module):
    """One distillation position: two taps, and the loss of what they take.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the batch norm that the teacher's value comes from; None: there is none.

    Attributes:
        guided_share: the part of the student's body, by weights, that leads to its value.
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

    @property
    def are_maps(self) -> bool:
        """Whether both values are maps whose positions lie as they lie in the image, as far as is known."""
        return all(layout is None or layout.is_map for layout in self._layouts)

    def _channels_second(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        teacher_dim, student_dim = self.channel_dims
        if self.are_maps or self._same_tokens(student, teacher):
            return channels_second(student, student_dim), channels_second(teacher, teacher_dim)
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
        self, student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of features as they were tapped, a scalar: summed over the elements, or their mean.

        A mask (N, H, W) of the input's pixels, bool, is True where they belong to an image; the other elements are left out.
        """
        raise NotImplementedError

    def forward(
        self, student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss; as the module's call, it is what ``position.compile(dynamic=True)`` compiles."""
        return self.loss(student, teacher, reduction, mask)

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, and the share of the student's body that the position guides."""
        teacher_size, student_size = self.spatial
        sizes = f"{self.teacher_channels} x {teacher_size} -> {self.student_channels} x {student_size}"
        return f"{self.name}, {sizes}, {self.guided_share:.0%} of the body"


class FeatureDistiller(nn.Module):
    """Distils a teacher into a student through their features.

    Neither network is changed: the features are taken by hooks (`release` removes them), and ``distiller.student`` is the
    network to deploy. The teacher stays in evaluation mode, gets no gradients, and is in neither ``parameters()`` nor
    ``state_dict()``.

    Args:
        teacher: the large network, or the part of one that corresponds to the student.
        student: the small network, or a part of one.
        taps: as of `MatchingDistiller`.
        position: makes a position, given the arguments of `FeaturePosition`.
        loss_weight: as of `MatchingDistiller`.
        example: as of `MatchingDistiller`.
        loss_reduction: as of `MatchingDistiller`.
        prepare: as of `MatchingDistiller`.

    Attributes:
        student: the student, as it was given.
        positions: the positions, from shallow to deep.
        position_losses: each position's weighted loss in the last forward pass (n,), detached.
        guided_share: the part of the student's body, by weights, that leads to a position; the body is what makes maps or
            tokens, without a head on pooled features.
        unguided: the paths of the body's other weights.

    Raises:
        ValueError: taps that do not exist or cannot be found, or weights that do not fit them.
    """

    positions: Sequence[FeaturePosition]
    position_losses: Tensor
    guided_share: float
    unguided: list[str]

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Literal["auto"] | Sequence[tuple[Tap | str, Tap | str]],
        position: Callable[[Tap, Tap, tuple[Operation, Operation], tuple[str, nn.Module] | None], FeaturePosition],
        loss_weight: float | Sequence[float] | Literal["paper"],
        example: Tensor | tuple[Any, ...] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        prepare: Preparation | None = None,
    ) -> None:
        super().__init__()
        for role, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"the {role} is a {type(model).__name__}: expected a torch.nn.Module")
        shared = shared_modules(teacher, student)
        traces = trace_pair(teacher, student, example)
        if not isinstance(taps, Iterable) or (isinstance(taps, str) and taps != "auto"):
            raise ValueError(f"taps={taps!r}: expected 'auto' or a sequence of (teacher tap, student tap)")
        pairs = [(first.tap, second.tap) for first, second in choose(*traces)] if taps == "auto" else _pairs(taps)
        found = [
            (tapped_operation(traces[0], teacher, one), tapped_operation(traces[1], student, two)) for one, two in pairs
        ]
        like = next((weight for weight in student.parameters() if weight.is_floating_point()), torch.empty(0))
        self._modes_compared = False
        if example is not None:
            lasting = self._lasting(student, [tap for _, tap in pairs], found, placed(example, like), taps == "auto")
            pairs, found = [pairs[number] for number in lasting], [found[number] for number in lasting]
        positions = []
        for (first, second), values in zip(pairs, found, strict=True):
            path = margin_source(traces[0], values[0])
            positions.append(position(first, second, values, None if path is None else (path, resolve(teacher, path))))
        modules = nn.ModuleList(positions).to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.positions = cast("Sequence[FeaturePosition]", modules)
        self._weights = _weights(loss_weight, len(positions))
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: expected 'mean' or 'sum'")
        self._loss_reduction: Literal["mean", "sum"] = "sum" if loss_weight == "paper" else loss_reduction
        self.student = student
        self._student_capture = Capture(student, [position.student for position in positions])
        # Of each position the modules that its value comes from, and the positions that train none of them.
        self._before = [modules_before(traces[1], student_value) for _, student_value in found]
        self._guides(traces[1], [student_value for _, student_value in found])
        self._frozen: set[int] = set()
        self._graphs_seen = False
        # Not a submodule: the teacher's weights are neither trained nor saved with the distiller.
        teacher_taps = [position.teacher for position in positions]
        if prepare is not None:
            prepare = functools.partial(prepare, folds=foldable(traces[0], teacher_taps))
        self._teacher = FrozenTeacher(teacher, teacher_taps, prepare, shared)
        self.position_losses = torch.zeros(len(positions))

    def _guides(self, trace: Trace, values: Sequence[Operation]) -> None:
        """Note which of the student's weights the positions guide; warn where it is the smaller part."""
        body = trace.body()
        whole = max(1, trace.elements(body))
        left = body
        for position, value in zip(self.positions, values, strict=True):
            position.guided_share = trace.elements(body & value.weights) / whole
            left &= ~value.weights
        self.guided_share, self.unguided = 1 - trace.elements(left) / whole, trace.named(left)
        if self.guided_share < 0.5:
            sizes: Counter[str] = Counter()
            for name in self.unguided:
                sizes[".".join(name.split(".")[:-1][:2]) or name] += trace.sizes[trace.weights.index(name)]
            largest = ", ".join(f"{path} ({size / whole:.0%})" for path, size in sizes.most_common(3))
            warnings.warn(
                f"only {self.guided_share:.0%} of the student's body, by weights, leads to a position: the rest learns from "
                f"the task alone, most of it in {largest}. To guide it as well, give taps behind it (taps=)",
                stacklevel=4,
            )

    @property
    def teacher(self) -> nn.Module:
        """The teacher, as it was given."""
        return self._teacher.model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureDistiller:
        self._teacher.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run student and teacher on the same input.

        Returns:
            The student's own output, and the distillation loss: a scalar in the graph.
        """
        with self.capture(*args, **kwargs) as captured:
            output = self.student(*args, **kwargs)
        return output, self.loss(captured)

    @contextlib.contextmanager
    def capture(self, *args: Any, **kwargs: Any) -> Iterator[Captured]:
        """Collect the student's features and input in a block that runs it, for `loss`.

        For a student that is a part of a larger model: run the model in the block. Where the student's arguments are known,
        give them: the teacher then runs before the block, which leaves what it has freed to the student.

        Raises:
            ValueError: at the end, if a tap was not reached.
        """
        with self._student_capture() as captured:
            if args or kwargs:
                captured.arguments = args, kwargs
                self.teacher_values(captured)
            yield captured

    def loss(self, captured: Captured, mask: Tensor | None = None) -> Tensor:
        """Run the teacher, unless it has run, on exactly the input that the student had, and return the loss, a scalar.

        Args:
            captured: what `capture` collected.
            mask: pixels of the input that belong to an image (N, H, W), bool, True, where images are padded to a batch:
                the padding is left out; None: there is none.

        Raises:
            ValueError: a mask that is not bool (N, H, W), or features that are no maps with a mask.
        """
        self._student_capture.finish(captured)  # the block may go on
        self._student_capture.check(captured)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_step(captured)
        teacher_values = self.teacher_values(captured)
        # Sums are per image of the batch; means are already.
        share = 1 / len(captured.values[0]) if self._loss_reduction == "sum" else 1.0
        losses = [
            position(captured.values[number], teacher_values[number], self._loss_reduction, mask) * (weight * share)
            for number, (position, weight) in enumerate(zip(self.positions, self._weights, strict=True))
        ]
        self.position_losses = torch.stack(losses).detach()
        return torch.stack(losses).sum()

    def _check_step(self, captured: Captured) -> None:
        """See that a step trains the student by each position: at the first one in the graphs, then at a glance.

        Raises:
            ValueError: values without a graph, or of other shapes than in evaluation mode.
        """
        if getattr(self, "_is_replica", False):  # its weights are copies in the graph
            return
        weights = None if self._graphs_seen else {id(weight) for weight in self.student.parameters()}
        self._graphs_seen = True
        lost, frozen = [], []
        for number, value in captured.values.items():
            if value.requires_grad and (weights is None or leads_to(value, weights)):
                continue
            if not trains_any(self.student, self._before[number]):
                frozen.append(number)
            elif not value.requires_grad:
                lost.append(number)
        if lost:
            raise ValueError(
                f"the distillation loss at {self._listed(lost)} reaches no weight of the student, though weights before it "
                "are to be trained: the value has no graph. The student's last call in the block was made under "
                "torch.no_grad(), as to measure it, or the value is detached, or lies in a checkpoint with "
                "use_reentrant=True (give use_reentrant=False). To look at the loss alone, call distiller.eval() first"
            )
        if news := [number for number in frozen if number not in self._frozen]:
            self._frozen.update(news)
            warnings.warn(
                f"nothing before {self._listed(news)} is to be trained: the distillation has no effect there. Leave "
                "these positions out, or unfreeze what is before them",
                stacklevel=2,
            )
        if self.student.training:
            self.compare_modes(captured)

    def _listed(self, positions: Sequence[int]) -> str:
        return ", ".join(str(self.positions[number].student) for number in positions)

    def compare_modes(self, captured: Captured) -> None:
        """See, once, that the student's values have the same shapes in the mode that it is not in.

        Raises:
            ValueError: they have not.
        """
        if self._modes_compared or captured.arguments is None:
            return
        self._modes_compared = True
        taps, training = [position.student for position in self.positions], not self.student.training
        shapes = [tuple(captured.values[number].shape) for number in range(len(taps))]
        if changed := changed_by_mode(self.student, taps, shapes, captured.arguments, training):
            raise ValueError(other_modes_problem(taps, shapes, changed, "training" if training else "evaluation"))

    def _lasting(
        self,
        student: nn.Module,
        taps: Sequence[Tap],
        values: Sequence[tuple[Operation, Operation]],
        arguments: tuple[Any, ...],
        chosen: bool,
    ) -> list[int]:
        """The numbers of the taps whose values have the same shapes in training mode; chosen ones may be fewer.

        Raises:
            ValueError: given taps, or all, have other values.
        """
        shapes = [value.shape or () for _, value in values]
        changed = changed_by_mode(student, taps, shapes, (arguments, {}))
        self._modes_compared = changed is not None
        if changed and not (chosen and len(changed) < len(taps)):
            raise ValueError(other_modes_problem(taps, shapes, changed, "training"))
        return [number for number in range(len(taps)) if number not in (changed or ())]

    def teacher_values(self, captured: Captured) -> dict[int, Any]:
        """The teacher's values for what `capture` collected, by a run of it unless it has run."""
        if captured.teacher_values is None:
            captured.teacher_values = self._teacher(captured)
        return captured.teacher_values

    def release(self) -> nn.Module:
        """Take the hooks off both networks and return the student; the distiller is of no use afterwards."""
        self._student_capture.remove()
        self._teacher.capture.remove()
        return self.student

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({type(self.teacher).__name__} -> {type(self.student).__name__}"]
        lines += [f"  {number}: {position.extra_repr()}" for number, position in enumerate(self.positions)]
        return "\n".join([*lines, f") guides {self.guided_share:.0%} of the student's body"])


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


def _weights(loss_weight: float | Sequence[float] | Literal["paper"], positions: int) -> list[float]:
    """The weight of every position."""
    if loss_weight == "paper":
        return [1 / (PAPER_FACTOR * 2 ** (positions - 1 - number)) for number in range(positions)]
    if isinstance(loss_weight, str):
        raise ValueError(f"loss_weight={loss_weight!r}: expected a number, a number for each position, or 'paper'")
    weights: list[Any] = list(loss_weight) if isinstance(loss_weight, Sequence) else [loss_weight] * positions
    if len(weights) != positions:
        raise ValueError(f"loss_weight has {len(weights)} numbers for {positions} positions: expected one for each")
    if not all(map(amount, weights)):
        raise ValueError(f"loss_weight={loss_weight!r}: expected finite numbers of at least 0, one for each position")
    return [float(weight) for weight in weights]


def amount(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf

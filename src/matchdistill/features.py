"""What the distillers of features have in common: tapped values of teacher and student, compared position by position.

Axes: N batch, * position axes.
"""

from __future__ import annotations

import contextlib
import functools
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from matchdistill.capture import Capture, Captured
from matchdistill.checks import changed_by_mode, leads_to, modules_before, other_modes_problem, trains_any
from matchdistill.choice import choose, placed, trace_pair
from matchdistill.options import FeatureOptions, Taps
from matchdistill.position import FeaturePosition
from matchdistill.prepare import foldable
from matchdistill.taps import Tap, margin_source, resolve, tapped_operation
from matchdistill.teacher import FrozenTeacher, shared_modules
from matchdistill.trace import Operation, Trace

_INDENTED = textwrap.TextWrapper(80, initial_indent=" " * 5, subsequent_indent=" " * 5, break_long_words=False)


class FeatureDistiller(nn.Module):
    """Distils a teacher into a student through their features.

    Neither network is changed: the features are taken by hooks (`release` removes them), and ``distiller.student`` is the
    network to deploy. The teacher stays in evaluation mode, gets no gradients, and is in neither ``parameters()`` nor
    ``state_dict()``.

    Args:
        teacher: the large network, or the part of one that corresponds to the student.
        student: the small network, or a part of one.
        taps: where their features are taken, see `FeatureOptions`.
        position: makes a position, given the arguments of `FeaturePosition`; a subclass of it, for example.
        options: further fields of `FeatureOptions`: loss_weight, example, loss_reduction, prepare.

    Attributes:
        student: the student, as it was given.
        positions: the positions, from shallow to deep.
        position_losses: each position's weighted loss in the last forward pass (n,), detached.
        guided_share: the part of the student's body, by weights, that leads to a position; the body is what makes maps or
            tokens, without a head on pooled features.
        unguided: the paths of the body's other weights.
        unreached: the paths of all weights that lead to no position, a head's among them.

    Raises:
        TypeError: an unknown option, or what is no network.
        ValueError: taps that do not exist or cannot be found, weights that do not fit them, or options out of range.
    """

    positions: Sequence[FeaturePosition]
    position_losses: Tensor
    guided_share: float
    unguided: list[str]
    unreached: list[str]

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Taps,
        position: Callable[[Tap, Tap, tuple[Operation, Operation], tuple[str, nn.Module] | None], FeaturePosition],
        **options: Any,
    ) -> None:
        super().__init__()
        checked = FeatureOptions.of(taps=taps, **options)
        for role, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"the {role} is a {type(model).__name__}: expected a torch.nn.Module")
        shared = shared_modules(teacher, student)
        traces = trace_pair(teacher, student, checked.example)
        given = checked.pairs()
        pairs = [(first.tap, second.tap) for first, second in choose(*traces)] if given is None else given
        found = [
            (tapped_operation(traces[0], teacher, one), tapped_operation(traces[1], student, two)) for one, two in pairs
        ]
        like = next((weight for weight in student.parameters() if weight.is_floating_point()), torch.empty(0))
        self._modes_compared = False
        if checked.example is not None:
            arguments = placed(checked.example, like)
            lasting = self._lasting(student, [tap for _, tap in pairs], found, arguments, given is None)
            pairs, found = [pairs[number] for number in lasting], [found[number] for number in lasting]
        positions = []
        for (first, second), values in zip(pairs, found, strict=True):
            path = margin_source(traces[0], values[0])
            positions.append(position(first, second, values, None if path is None else (path, resolve(teacher, path))))
        modules = nn.ModuleList(positions).to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.positions = cast("Sequence[FeaturePosition]", modules)
        self._weights = checked.weights(len(positions))
        self._loss_reduction = checked.applied_loss_reduction
        self.student = student
        self._student_capture = Capture(student, [position.student for position in positions])
        # Of each position the modules that its value comes from, and the positions that train none of them.
        self._before = [modules_before(traces[1], student_value) for _, student_value in found]
        self._guides(traces[1], [student_value for _, student_value in found])
        self._frozen: set[int] = set()
        self._graphs_seen = False
        # Not a submodule: the teacher's weights are neither trained nor saved with the distiller.
        teacher_taps = [position.teacher for position in positions]
        prepare = checked.prepare
        if prepare is not None:
            prepare = functools.partial(prepare, folds=foldable(traces[0], teacher_taps))
        self._teacher = FrozenTeacher(teacher, teacher_taps, prepare, shared)
        self.position_losses = torch.zeros(len(positions))

    def _guides(self, trace: Trace, values: Sequence[Operation]) -> None:
        """Note which of the student's weights the positions guide; warn where it is the smaller part."""
        body = trace.body()
        whole = max(1, trace.elements(body))
        left, unreached = body, (1 << len(trace.weights)) - 1
        for position, value in zip(self.positions, values, strict=True):
            position.guided_share = trace.elements(body & value.weights) / whole
            left &= ~value.weights
            unreached &= ~value.weights
        self.guided_share, self.unguided = 1 - trace.elements(left) / whole, trace.named(left)
        self.unreached = trace.named(unreached)
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

    @property
    def frozen_teacher(self) -> FrozenTeacher:
        """What runs the teacher."""
        return self._teacher

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

        The methods below that are "for subclasses" are the steps that other distillers replace.

        Args:
            captured: what `capture` collected.
            mask: pixels of the input that belong to an image (N, H, W), bool, True, where images are padded to a batch:
                the padding is left out; None: there is none.

        Raises:
            RuntimeError: a `MatchingDistiller` before its first refresh.
            ValueError: a mask that is not bool (N, H, W), or features that are no maps with a mask.
        """
        self._check_ready()
        self._student_capture.finish(captured)  # the block may go on
        self._student_capture.check(captured)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_step(captured)
        values = self.teacher_values(captured)
        if not self._fit(captured, values):
            values = captured.teacher_values = self._teacher(captured)
        self._after_teacher(captured, mask)
        # Sums are per image of the batch; means are already.
        share = 1 / len(captured.values[0]) if self._loss_reduction == "sum" else 1.0
        losses = [
            position(captured.values[number], values[number], self._loss_reduction, mask) * (weight * share)
            for number, (position, weight) in enumerate(zip(self.positions, self._weights, strict=True))
        ]
        self.position_losses = torch.stack(losses).detach()
        return torch.stack(losses).sum()

    def _check_ready(self) -> None:
        """Raise an error if there can be no loss yet; for subclasses."""

    def _early_use(self) -> Callable[[int, Tensor], Any] | None:
        """A function that turns a value which the teacher changes later, given its number, into what the loss needs.

        None: the value is copied. For subclasses.
        """
        return None

    def _fit(self, captured: Captured, values: dict[int, Any]) -> bool:
        """Whether what was made of the teacher's values fits the student's; for subclasses."""
        return True

    def _after_teacher(self, captured: Captured, mask: Tensor | None) -> None:
        """What a step does with the values of both networks before the loss; for subclasses."""

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
            captured.teacher_values = self._teacher(captured, self._early_use())
        return captured.teacher_values

    def whole_values(self, captured: Captured) -> dict[int, Any]:
        """The teacher's values by another run of it, as they are and not reduced to what the loss needs."""
        captured.teacher_values = self._teacher(captured)
        return captured.teacher_values

    def release(self) -> nn.Module:
        """Take the hooks off both networks and return the student; the distiller is of no use afterwards."""
        self._student_capture.remove()
        self._teacher.capture.remove()
        return self.student

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({type(self.teacher).__name__} -> {type(self.student).__name__}"]
        for number, position in enumerate(self.positions):
            taps, of_them = position.name, position.extra_repr().removeprefix(f"{position.name}, ")
            lines += [f"  {number}: {taps}", *_INDENTED.wrap(of_them)]
        return "\n".join([*lines, f") guides {self.guided_share:.0%} of the student's body"])

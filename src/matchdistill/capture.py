"""Taking features during a forward pass: hooks that stay on the model and write only for the thread that asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.probing import OwnHook
from matchdistill.taps import Tap, resolve
from matchdistill.trace import tensors_in

ARGUMENTS = -1  # stands for the model's arguments where taps have their numbers


class ChangedInPlaceError(ValueError):
    """A value was changed after it had been taken for one that stays; the next pass copies it."""


class _Watched(NamedTuple):
    """Tensors of the network with their versions when they were taken; in-place operations change these."""

    tensors: list[Tensor]
    versions: list[int]
    training: bool
    copied: bool


@dataclass
class Captured:
    """What one forward pass left.

    Attributes:
        values: the tapped values, by number of the tap.
        arguments: the positional and keyword arguments of the model's last call.
        teacher_values: the teacher's tapped values for these arguments, after it ran.
        teacher_output: what the teacher returned for them, after it ran.
        copied: makes the copy of a value that is changed later, given the number of its tap; None: a whole one.
        watched: what was taken or copied, to see whether the network changed it.
        calls: of the tapped modules so far.
        inside: whether the model itself runs at the moment.
        taken_inside: the taps whose values it gave, rather than other networks that have a tapped module too.
        finished: whether the values are complete, sums added up.
    """

    values: dict[int, Any] = field(default_factory=dict)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    teacher_values: dict[int, Any] | None = None
    teacher_output: Any = None
    copied: Callable[[int, Tensor], Any] | None = None
    watched: dict[int, _Watched] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    inside: bool = False
    taken_inside: set[int] = field(default_factory=set)
    finished: bool = False


class _Active(threading.local):
    """The captures under way in this thread, by the identity of their `Capture`; the innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, Captured]] = []


# Of the thread, not of the model: replicas of a model (DataParallel) run in threads and share its hooks.
_active = _Active()


class Capture:
    """Hooks on a model for a sequence of taps.

    The hooks are idle outside of ``with capture() as captured``, and each thread gets the values of its own pass. A value
    is a view of the tapped tensor, in the graph; where the network goes on to change it in place (an in-place activation
    behind a tapped batch norm), a copy from before. The same holds for the arguments. Of a module that other networks have
    too (one activation for all), the value is the one from inside of this model.

    Args:
        model: the network, which is not changed otherwise.
        taps: where to take features; at a module's last call in a pass.

    Raises:
        ValueError: a module that the model does not have, or a scripted one.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = list(taps)
        # What is added to the value of a tap has a number after theirs: {its number: the tap's}.
        added = [number for number, tap in enumerate(self.taps) if tap.plus is not None]
        self._sums = dict(enumerate(added, len(self.taps)))
        self._addends = {*self._sums, *self._sums.values()}
        self._hooked = [*self.taps, *(tap.plus for tap in self.taps if tap.plus is not None)]
        # (number, training) -> whether every pass so far left the value unchanged: then it needs no copy.
        self._kept: dict[tuple[int, bool], bool] = {}
        # number -> calls of its module in a pass in evaluation mode, 0 if their number varies: the earlier of them need no
        # copy. In training mode modules may be left out at random.
        self._calls: dict[int, int] = {}
        for path in ("", *(tap.module for tap in self._hooked)):
            if isinstance(resolve(model, path), torch.jit.ScriptModule):
                raise ValueError(f"module {path!r} is a scripted one, which takes no hooks: give it unscripted")
        if any(_is_compiled(module) for module in model.modules()):
            torch.compiler.reset()  # what has run so far was compiled without the hooks
        self._handles = [model.register_forward_pre_hook(_ArgumentsHook(self), with_kwargs=True)]
        for number, tap in enumerate(self._hooked):
            module = resolve(model, tap.module)
            if tap.side == "input":
                handle = module.register_forward_pre_hook(_InputHook(self, number), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_OutputHook(self, number))
            self._handles.append(handle)
        self._handles.append(model.register_forward_hook(_EndHook(self)))

    @contextlib.contextmanager
    def __call__(self, alone: bool = False) -> Iterator[Captured]:
        """Collect the values of the forward passes made in the block.

        Args:
            alone: whether the captures around the block pause: what runs in it is none of their networks.

        Raises:
            ValueError: a tap was not reached.
        """
        captured = Captured()
        around = _active.stack
        _active.stack = [*([] if alone else around), (id(self), captured)]
        try:
            yield captured
        finally:
            _active.stack = around
        self.finish(captured)

    def finish(self, captured: Captured) -> None:
        """See that the pass is complete, learn from it which values need copies, and add up what sums consist of.

        Raises:
            ValueError: a tap was not reached, or its value was changed in place, the first time.
        """
        if captured.finished:
            return
        missing = [str(tap) for number, tap in enumerate(self._hooked) if number not in captured.values]
        if missing:
            raise ValueError(
                f"the forward pass did not reach {', '.join(missing)}: call the whole model in the block, and tap modules "
                "that give tensors; if it is part of something compiled that has run, call torch.compiler.reset() first"
            )
        self.check(captured)
        for number, total in self._sums.items():
            captured.values[total] = captured.values[total] + captured.values.pop(number)
        captured.finished = True

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> Captured | None:
        """The capture under way in this thread, if any."""
        for owner, captured in reversed(_active.stack):
            if owner == id(self):
                return captured
        return None

    def take(self, number: int, module: nn.Module, value: Any) -> None:
        """Keep the first tensor of a tapped module's input or output."""
        captured = self.current()
        if captured is None or (number in captured.taken_inside and not captured.inside):
            return
        captured.finished = False
        if captured.inside:
            captured.taken_inside.add(number)
        tensor = next(iter(tensors_in(value)), None)
        if tensor is None:
            captured.values.pop(number, None)
            return
        captured.calls[number] = calls = captured.calls.get(number, 0) + 1
        known = 0 if module.training else self._calls.get(number, 0)
        keeps = self.keeps(number, module.training) or calls < known
        if keeps:
            # As a view it is a node of the graph, as a copy is: gradients add up in the same order in the first pass, which
            # copies, and in later ones, and a resumed run ends as the one that was not cut.
            captured.values[number] = tensor.view_as(tensor) if tensor.requires_grad else tensor
        elif captured.copied is not None and calls == known and number not in self._addends:
            captured.values[number] = captured.copied(number, tensor)
        else:
            captured.values[number] = tensor.clone()
        _watch(captured, number, [tensor], module.training, not keeps)

    def take_arguments(self, module: nn.Module, arguments: tuple[Any, Any]) -> None:
        """Keep the arguments of the model."""
        captured = self.current()
        if captured is None:
            return
        captured.inside = True
        keeps = self.keeps(ARGUMENTS, module.training)
        captured.arguments = arguments if keeps else copy_of(arguments)
        _watch(captured, ARGUMENTS, tensors_in(arguments), module.training, not keeps)

    def end(self) -> None:
        """Note that the model has run."""
        if (captured := self.current()) is not None:
            captured.inside = False

    def keeps(self, number: int, training: bool) -> bool:
        """Whether the passes in that mode leave the value of a tap, or the `ARGUMENTS`, unchanged, as far as is known."""
        return self._kept.get((number, training), False)

    def check(self, captured: Captured) -> None:
        """Learn which values are changed in place.

        Raises:
            ValueError: one was changed, and no copy was made since this is the first time.
        """
        for number, (tensors, versions, training, copied) in captured.watched.items():
            if not training and number != ARGUMENTS:
                calls = captured.calls[number]
                self._calls[number] = calls if self._calls.get(number, calls) == calls else 0
            if [tensor._version for tensor in tensors] == versions:
                self._kept.setdefault((number, training), True)
                continue
            self._kept[number, training] = False
            if not copied:
                place = "the input" if number == ARGUMENTS else f"the value at {self._hooked[number]}"
                raise ChangedInPlaceError(
                    f"{place} was changed in place in this pass but not in the passes before: "
                    "a network whose calls or in-place operations come and go cannot be tapped there, choose another module"
                )


@dataclass
class _Hook(OwnHook):
    """A hook that can be copied and pickled along with its model."""

    capture: Capture
    number: int = -1


class _InputHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.capture.take(self.number, module, (args, kwargs))


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.capture.take(self.number, module, output)


class _ArgumentsHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.capture.take_arguments(module, (args, kwargs))


class _EndHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.capture.end()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _watch(captured: Captured, number: int, tensors: list[Tensor], training: bool, copied: bool) -> None:
    if not torch.compiler.is_compiling() and not any(tensor.is_inference() for tensor in tensors):
        captured.watched[number] = _Watched(tensors, [tensor._version for tensor in tensors], training, copied)


def copy_of(arguments: Any) -> Any:
    """The arguments with a copy of every tensor, without a graph."""
    return tree_map_only(Tensor, lambda value: value.detach().clone(), arguments)

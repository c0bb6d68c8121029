"""Taking features during a forward pass: hooks that stay on the model and write only for the thread that asked."""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.probing import OwnHook
from matchdistill.taps import Tap, resolve
from matchdistill.trace import tensors_in

ARGUMENTS = -1  # stands for the model's arguments where taps have their numbers
VARYING = 0  # stands for a number of calls that is not the same in every pass


class ChangedInPlaceError(ValueError):
    """A value was changed after it had been taken for one that stays; the next pass copies it."""


class InPlace(enum.Enum):
    """What is known of a value that a network computes: whether it changes the value in place later in the pass."""

    UNKNOWN = enum.auto()
    KEPT = enum.auto()
    CHANGED = enum.auto()


@dataclass
class InPlaceWatch:
    """What the passes so far have shown of one value in one mode of the network, and what follows for the next one.

    ::

                       the pass kept it
          UNKNOWN -------------------------> KEPT
          (copied)                           (taken without a copy)
             |                                 |
             | the pass changed it             | the pass changed it: a ChangedInPlaceError,
             v                                 | unless a copy was taken
          CHANGED <----------------------------+
          (copied from now on)

    A module that is called several times in a pass gives its last value. Once the number of calls is known, the earlier
    ones need no copy.

    Attributes:
        state: what is known.
        calls: how often each pass called the module, or `VARYING`; None: not known yet. It stays None in training mode,
            in which modules may be left out at random.
    """

    state: InPlace = InPlace.UNKNOWN
    calls: int | None = None

    def needs_copy(self, call: int) -> bool:
        """Whether the value of the module's call of this number, from 1, has to be copied."""
        replaced_later = self.calls is not None and call < self.calls  # never where the calls vary
        return self.state is not InPlace.KEPT and not replaced_later

    def is_last(self, call: int) -> bool:
        """Whether the call is known to be the last one of the pass."""
        return call == self.calls

    def learn(self, changed: bool) -> None:
        """Note whether a pass changed the value."""
        if changed:
            self.state = InPlace.CHANGED
        elif self.state is InPlace.UNKNOWN:
            self.state = InPlace.KEPT

    def learn_calls(self, calls: int) -> None:
        """Note how many calls a pass had."""
        self.calls = calls if self.calls in (None, calls) else VARYING


class _Taken(NamedTuple):
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
        make_copy: makes the copy of a value that is changed later, given the number of its tap; None: a whole one.
        taken: the network's own tensors at the taps, to see whether it changed them.
        calls: of the tapped modules so far.
        inside: whether the model itself runs at the moment.
        inside_taps: the taps whose values it gave, rather than other networks that have a tapped module too.
        finished: whether the values are complete, sums added up.
    """

    values: dict[int, Any] = field(default_factory=dict)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    teacher_values: dict[int, Any] | None = None
    teacher_output: Any = None
    make_copy: Callable[[int, Tensor], Any] | None = None
    taken: dict[int, _Taken] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    inside: bool = False
    inside_taps: set[int] = field(default_factory=set)
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

    Attributes:
        taps: as given.
        hooked: where values are taken: at the taps, and after these at what is added to their values.

    Raises:
        ValueError: a module that the model does not have, or a scripted one.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = list(taps)
        # What is added to the value of a tap has a number after theirs: {its number: the tap's}.
        added = [number for number, tap in enumerate(self.taps) if tap.plus is not None]
        self._sums = dict(enumerate(added, len(self.taps)))
        self._addends = {*self._sums, *self._sums.values()}
        self.hooked = [*self.taps, *(tap.plus for tap in self.taps if tap.plus is not None)]
        # By number of the tap, and whether the module is in training mode.
        values = [ARGUMENTS, *range(len(self.hooked))]
        self._watches = {(number, mode): InPlaceWatch() for number in values for mode in (False, True)}
        for path in ("", *(tap.module for tap in self.hooked)):
            if isinstance(resolve(model, path), torch.jit.ScriptModule):
                raise ValueError(f"module {path!r} is a scripted one, which takes no hooks: give it unscripted")
        if any(_is_compiled(module) for module in model.modules()):
            torch.compiler.reset()  # what has run so far was compiled without the hooks
        self._handles = [model.register_forward_pre_hook(_ArgumentsHook(self), with_kwargs=True)]
        for number, tap in enumerate(self.hooked):
            module = resolve(model, tap.module)
            if tap.side == "input":
                handle = module.register_forward_pre_hook(_InputHook(self, number), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_OutputHook(self, number))
            self._handles.append(handle)
        self._handles.append(model.register_forward_hook(_EndHook(self)))

    def __getstate__(self) -> dict[str, Any]:
        """What copies have: without the handles of a model that is gone, of which a shared module still has hooks."""
        return {
            **self.__dict__,
            "_handles": [handle for handle in self._handles if handle.hooks_dict_ref() is not None],
        }

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
        missing = [str(tap) for number, tap in enumerate(self.hooked) if number not in captured.values]
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
        if captured is None or (number in captured.inside_taps and not captured.inside):
            return
        captured.finished = False
        if captured.inside:
            captured.inside_taps.add(number)
        tensor = next(iter(tensors_in(value)), None)
        if tensor is None:
            captured.values.pop(number, None)
            return
        captured.calls[number] = call = captured.calls.get(number, 0) + 1
        watch = self._watches[number, module.training]
        copied = watch.needs_copy(call)
        if not copied:
            # As a view it is a node of the graph, as a copy is: gradients add up in the same order in the first pass, which
            # copies, and in later ones, and a resumed run ends as the one that was not cut.
            captured.values[number] = tensor.view_as(tensor) if tensor.requires_grad else tensor
        elif captured.make_copy is not None and watch.is_last(call) and number not in self._addends:
            captured.values[number] = captured.make_copy(number, tensor)
        else:
            captured.values[number] = tensor.clone()
        _note(captured, number, [tensor], module.training, copied)

    def give(self, values: Mapping[int, Tensor]) -> None:
        """Keep values that the hooks do not see, by number of the tap. Nothing changes them, nothing is learned of them."""
        if (captured := self.current()) is not None:
            captured.values.update(values)
            captured.finished = False

    def take_arguments(self, module: nn.Module, arguments: tuple[Any, Any]) -> None:
        """Keep the arguments of the model."""
        captured = self.current()
        if captured is None:
            return
        captured.inside = True
        copied = self.changes_arguments(module.training)
        captured.arguments = copy_of(arguments) if copied else arguments
        _note(captured, ARGUMENTS, tensors_in(arguments), module.training, copied)

    def end(self) -> None:
        """Note that the model has run."""
        if (captured := self.current()) is not None:
            captured.inside = False

    def changes_arguments(self, training: bool) -> bool:
        """Whether passes in that mode change the model's arguments in place, or might, as far as is known."""
        return self._watches[ARGUMENTS, training].state is not InPlace.KEPT

    def check(self, captured: Captured) -> None:
        """Learn which values are changed in place.

        Raises:
            ValueError: one was changed, and no copy was made since this is the first time.
        """
        for number, (tensors, versions, training, copied) in captured.taken.items():
            watch = self._watches[number, training]
            if not training and number != ARGUMENTS:
                watch.learn_calls(captured.calls[number])
            changed = [tensor._version for tensor in tensors] != versions
            watch.learn(changed)
            if changed and not copied:
                place = "the input" if number == ARGUMENTS else f"the value at {self.hooked[number]}"
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


def capture_of(model: nn.Module) -> Capture:
    """The capture that was the first to put its hooks on a model, if necessary now."""
    hooks = (hook.capture for hook in model._forward_pre_hooks.values() if isinstance(hook, _ArgumentsHook))
    return next(hooks, None) or Capture(model, [])


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _note(captured: Captured, number: int, tensors: list[Tensor], training: bool, copied: bool) -> None:
    if not torch.compiler.is_compiling() and not any(tensor.is_inference() for tensor in tensors):
        captured.taken[number] = _Taken(tensors, [tensor._version for tensor in tensors], training, copied)


def copy_of(arguments: Any) -> Any:
    """The arguments with a copy of every tensor, without a graph."""
    return tree_map_only(Tensor, lambda value: value.detach().clone(), arguments)

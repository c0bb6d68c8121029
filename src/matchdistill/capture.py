"""Taking features during a forward pass: hooks that stay on the model and write only for the thread that asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.taps import Tap, resolve
from matchdistill.trace import tensors_in


@dataclass
class Captured:
    """What one forward pass left: the tapped values by number of the tap, and the arguments of the model's last call."""

    values: dict[int, Tensor] = field(default_factory=dict)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    # number -> (value as it is in the network, its version then, whether its module was in training mode): an in-place
    # operation that comes later changes the version.
    versions: dict[int, tuple[Tensor, int, bool]] = field(default_factory=dict)


class _Active(threading.local):
    """The captures under way in this thread, by the identity of their `Capture`; the innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, Captured]] = []


# Of the thread, not of the model: replicas of a model (DataParallel) run in threads and share its hooks.
_active = _Active()


class Capture:
    """Hooks on a model for a sequence of taps.

    The hooks are idle outside of ``with capture() as captured``, and each thread gets the values of its own pass. A value
    is the tapped tensor itself, in the graph; where the network goes on to change it in place (an in-place activation
    behind a tapped batch norm), a copy from before.

    Args:
        model: the network, which is not changed otherwise.
        taps: where to take features; at a module's last call in a pass.

    Raises:
        ValueError: a module that the model does not have.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = list(taps)
        # (tap, training) of the values that a whole pass left unchanged: these need no copy.
        self._unchanged: set[tuple[int, bool]] = set()
        self._handles = [model.register_forward_pre_hook(_ArgumentsHook(self), with_kwargs=True)]
        for number, tap in enumerate(self.taps):
            module = resolve(model, tap.module)
            if tap.side == "input":
                handle = module.register_forward_pre_hook(_InputHook(self, number), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_OutputHook(self, number))
            self._handles.append(handle)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Captured]:
        """Collect the values of the forward passes made in the block.

        Raises:
            ValueError: a tap was not reached.
        """
        captured = Captured()
        _active.stack.append((id(self), captured))
        try:
            yield captured
        finally:
            _active.stack.pop()
        self._check(captured)

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
        if captured is None:
            return
        tensor = tensors_in(value)[0]
        safe = (number, module.training) in self._unchanged
        captured.values[number] = tensor if safe else tensor.clone()
        if not torch.compiler.is_compiling() and not tensor.is_inference():
            captured.versions[number] = (tensor, tensor._version, module.training)

    def _check(self, captured: Captured) -> None:
        missing = [str(tap) for number, tap in enumerate(self.taps) if number not in captured.values]
        if missing:
            raise ValueError(f"the forward pass did not reach {', '.join(missing)}: call the whole model in the block")
        for number, (tensor, version, training) in captured.versions.items():
            if tensor._version == version:
                self._unchanged.add((number, training))
            elif captured.values[number] is tensor:
                raise ValueError(
                    f"the value at {self.taps[number]} was changed in place in this pass but not in the passes before: "
                    "a network whose in-place operations come and go cannot be tapped there, choose another module"
                )
        captured.versions.clear()


@dataclass
class _Hook:
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
        if (captured := self.capture.current()) is not None:
            captured.arguments = (args, kwargs)

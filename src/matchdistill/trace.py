"""One forward pass as a list of operations, and its cuts: the values through which everything flows.

Axes: N batch, C channels; the other axes of a value are its positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

INPUT = -1  # the number of the network's input, which no operation made

_CHANNELS_SECOND = {"batch_norm", "group_norm", "instance_norm"}
_CHANNELS_LAST = {"linear", "layer_norm", "rms_norm", "embedding"}
# "get" reads a property, mT or T.
_PERMUTING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "get"}
_RESHAPING = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat"}


@dataclass
class Operation:
    """One operation of the pass.

    Attributes:
        number: its place in the order of execution.
        name: the function's name without the underscores of its in-place and operator forms, "relu", "add", "conv2d".
        module: path of the innermost module that it ran in; "" is the network itself.
        inputs: numbers of the operations whose values it took, without repeats; `INPUT` for the network's input.
        shape: of its value; None where it made several.
        channel_dim: axis of the value's channels as far as it is known.
        outputs_of, inputs_of: modules whose last call in the pass returned, or was given, its value.
        last_use: number of the last operation that took its value; its own where none did.
    """

    number: int
    name: str
    module: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    channel_dim: int | None
    outputs_of: list[str] = field(default_factory=list)
    inputs_of: list[str] = field(default_factory=list)
    last_use: int = -1

    @property
    def spatial(self) -> tuple[int, ...]:
        """The sizes of the position axes."""
        assert self.shape is not None
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.channels_axis))

    @property
    def positions(self) -> int:
        """P, the number of positions per channel."""
        return math.prod(self.spatial)

    @property
    def channels_axis(self) -> int:
        """The channel axis; where the pass left it open, the last of (N, T, C) tokens and the second of anything else."""
        assert self.shape is not None
        if self.channel_dim is not None:
            return self.channel_dim
        return 2 if len(self.shape) == 3 else 1

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        assert self.shape is not None
        return self.shape[self.channels_axis]


class Call(NamedTuple):
    """A call as it is recorded: the function, (args, kwargs), and the tensors that it made or changed."""

    name: str
    arguments: tuple[Any, Any]
    made: list[Tensor]
    function: Callable[..., Any] | None = None


class Trace:
    """The operations of a forward pass that depend on its input, in order of execution."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.model = model
        self.operations: list[Operation] = []
        # id -> (tensor, number of the operation that made it); the tensor is kept, or its id would be given away.
        self._made: dict[int, tuple[Tensor, int]] = {}
        self._entered: list[tuple[str, Any]] = []
        self._noted: dict[tuple[str, str], list[str]] = {}
        self.batch = next((len(value) for value in tensors_in(example) if value.ndim), 0)
        for value in tensors_in(example):
            self._made[id(value)] = (value, INPUT)
        with (
            self._hooked(model),
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
            _Beneath(),  # type: ignore[no-untyped-call]
            _Recorder(self._record),
        ):
            output = model(*example)
        # Numbers of the operations whose values it returned.
        self.outputs = {self._made[id(value)][1] for value in tensors_in(output) if id(value) in self._made}
        self._made.clear()

    def cuts(self) -> list[Operation]:
        """The operations after which nothing made before them is used, with a single value that has the batch axis."""
        cuts = []
        latest = max((operation.number for operation in self.operations if INPUT in operation.inputs), default=INPUT)
        for operation in self.operations:
            shape = operation.shape
            if latest <= operation.number and shape is not None and len(shape) > 1 and shape[0] == self.batch:
                cuts.append(operation)
            latest = max(latest, operation.last_use)
        return cuts

    def made_by(self, number: int) -> Operation | None:
        """The operation of that number; None for the network's input."""
        return None if number == INPUT else self.operations[number]

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operations count as its caller's
                continue
            handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._entered.append((path, (args, kwargs)))
            self._note("inputs_of", path, tensors_in((args, kwargs)))

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            _, received = self._entered.pop()
            values = tensors_in(output)
            # Code that no mode sees (extensions in C++): the module is one operation.
            if any(id(value) not in self._made for value in values):
                self._record(Call(type(module).__name__, received, values), path)
            self._note("outputs_of", path, values)

        return hook

    def _note(self, side: str, path: str, values: list[Tensor]) -> None:
        """Note a module at the operation that made its first value, and only there: the last call counts."""
        if (earlier := self._noted.pop((side, path), None)) is not None:
            earlier.remove(path)
        if values and (maker := self._maker(values[0])) is not None:
            noted: list[str] = getattr(maker, side)
            noted.append(path)
            self._noted[side, path] = noted

    def _maker(self, value: Tensor) -> Operation | None:
        return self.made_by(self._made.get(id(value), (value, INPUT))[1])

    def _record(self, call: Call, module: str | None = None) -> None:
        sources = [value for value in tensors_in(call.arguments) if id(value) in self._made]
        if not sources or not call.made:
            return
        inputs = tuple(dict.fromkeys(self._made[id(value)][1] for value in sources))
        number = len(self.operations)
        self.operations.append(
            Operation(
                number,
                call.name,
                module if module is not None else self._entered[-1][0],
                inputs,
                tuple(call.made[0].shape) if len(call.made) == 1 else None,
                self._channel_dim(call, sources[0]),
                last_use=number,
            )
        )
        for source in inputs:
            if (maker := self.made_by(source)) is not None:
                maker.last_use = number
        for value in call.made:
            self._made[id(value)] = (value, number)

    def _channel_dim(self, call: Call, source: Tensor) -> int | None:
        """Where the channels of the value lie: convolutions and norms fix it, permutations and reshapes move it."""
        made = call.made[0]
        if call.name.startswith("conv") or call.name in _CHANNELS_SECOND:
            return 1
        if call.name in _CHANNELS_LAST:
            return made.ndim - 1
        maker = self._maker(source)
        axis = maker.channel_dim if maker is not None else (1 if source.ndim == 4 else None)
        if axis is None or axis >= source.ndim:
            return None
        if call.name in _PERMUTING and call.function is not None:
            # A tensor whose sizes are all different shows where the function puts each axis.
            args, kwargs = call.arguments
            sizes = list(range(2, 2 + source.ndim))
            return list(call.function(torch.empty(sizes, device="meta"), *args[1:], **kwargs).shape).index(2 + axis)
        if call.name in _RESHAPING or made.ndim != source.ndim:
            moved = made.ndim - 1 if axis == source.ndim - 1 else axis
            return moved if moved < made.ndim and made.shape[moved] == source.shape[axis] else None
        return axis


class _Beneath(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing, but brings the operations of scripted code before function modes, and has compiled code run eagerly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    """Tells of every call of a torch function."""

    def __init__(self, record: Callable[[Call], None]) -> None:
        super().__init__()
        self._tell = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [(value, _version(value)) for value in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:  # counts the change only later
            made = tensors_in(result)
        else:
            given = {id(value) for value, _ in before}
            changed = [value for value, version in before if _version(value) != version]
            made = [value for value in tensors_in(result) if id(value) not in given] + changed
        name = getattr(func, "overloadpacket", func).__name__.strip("_")
        if kwargs.get("alpha", 1) != 1:
            name += "_scaled"  # x + alpha * y is no sum of its inputs
        self._tell(Call(name, (args, kwargs), made, func))
        return result


def _version(value: Tensor) -> int:
    """The number of in-place changes; 0 for inference tensors, which do not count them."""
    try:
        return value._version
    except RuntimeError:
        return 0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

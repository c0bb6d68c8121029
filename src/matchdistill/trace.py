"""One forward pass as a graph: its operations, the weights behind each, and the values through which everything flows.

Axes: N batch, C channels; the other axes of a value are its positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from matchdistill.axes import INPUT, Axes, Call, Known, input_layout
from matchdistill.layout import Layout
from matchdistill.messages import silent
from matchdistill.probing import copy_of_model, evaluating, scratch


@dataclass
class Operation:
    """One operation of the pass.

    Attributes:
        number: its place in the order of execution.
        name: the function's name without the underscores of its in-place and operator forms, "relu", "add", "conv2d".
        module: path of the innermost module that it ran in; "" is the network itself.
        inputs: numbers of the operations whose values it took, without repeats; `INPUT` and below for the network's inputs.
        shape: of its value; None where it made several.
        layout: where the axes of its value come from, as far as it is known.
        weights: the network's weights that its value depends on, a bit for each of `Trace.weights`.
        sources: the network's inputs that its value depends on, a bit for each.
        outputs_of, inputs_of: modules whose last call in the pass returned, or was given, its value.
    """

    number: int
    name: str
    module: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    layout: Layout | None
    weights: int = 0
    sources: int = 1
    outputs_of: list[str] = field(default_factory=list)
    inputs_of: list[str] = field(default_factory=list)

    @property
    def channel_dim(self) -> int | None:
        """Axis of the value's channels, as far as it is known."""
        return self.layout.channel_dim if self.layout is not None else None

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
    def grid(self) -> tuple[int, ...]:
        """The sizes of the image's position axes at this value, of tokens too where they are known; else as `spatial`."""
        return (self.layout.grid if self.layout is not None else None) or self.spatial

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


class Trace:
    """The operations of a forward pass that depend on its input, in order of execution.

    The pass runs the model that it is given, without a graph; `traced` runs a copy.

    Args:
        model: the network.
        example: its positional arguments.
        options: its keyword arguments.
        training: the mode; in training mode the model stays in it.

    Attributes:
        model: the network.
        weights: the paths of its parameters, in the order of the bits of `Operation.weights`.
        batch: N of the example.
        inputs: the shapes of the tensors in the example.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        options: dict[str, Any] | None = None,
        training: bool = False,
    ) -> None:
        options = options or {}
        self.model = model
        self.operations: list[Operation] = []
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._entered: list[tuple[str, Any]] = []
        self._noted: dict[tuple[str, str], list[str]] = {}
        self._elements: dict[int, int] = {}
        parameters = dict(model.named_parameters())
        self.weights = list(parameters)
        self.sizes = [0 if nn.parameter.is_lazy(value) else value.numel() for value in parameters.values()]
        self.batch, inputs = _batch((*example, *options.values()))
        self._axes = Axes(self.batch, self._origin)
        self.inputs = [tuple(value.shape) for value, _ in inputs]
        for buffer in model.buffers():
            self._known[buffer] = Known()
        for bit, parameter in enumerate(parameters.values()):
            self._known[parameter] = Known(weights=1 << bit)
        for bit, (value, whole) in enumerate(inputs):
            self._known[value] = Known(INPUT - bit, 0, 1 << bit, input_layout(value, whole))
        with (
            self._hooked(model),
            contextlib.nullcontext(model.train()) if training else evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
            _Beneath(),  # type: ignore[no-untyped-call]
            _Recorder(self._record),
        ):
            output = model(*example, **options)
        # Numbers of the operations whose values it returned.
        made = [self._origin(value).number for value in tensors_in(output)]
        self.outputs = {number for number in made if number is not None}
        self._known = WeakTensorKeyDictionary()

    def made_by(self, number: int) -> Operation | None:
        """The operation of that number; None for the network's input."""
        return None if number <= INPUT else self.operations[number]

    def named(self, weights: int) -> list[str]:
        """The paths of weights that are given as bits."""
        return [path for number, path in enumerate(self.weights) if weights >> number & 1]

    def elements(self, weights: int) -> int:
        """The number of elements of weights that are given as bits."""
        if weights not in self._elements:
            self._elements[weights] = sum(size for number, size in enumerate(self.sizes) if weights >> number & 1)
        return self._elements[weights]

    def is_feature(self, operation: Operation) -> bool:
        """Whether a value has the channels of every position of an image, as far as is known, and several positions."""
        shape = operation.shape
        if shape is None or not 3 <= len(shape) <= 5 or shape[0] != self.batch or operation.name in ("pad", "unfold"):
            return False
        if operation.layout is not None and operation.layout.grid is None:
            return False
        return math.prod(operation.grid) > 1

    def body(self) -> int:
        """The weights, as bits, that make maps or tokens: all but a head on pooled features."""
        found = 0
        for operation in self.operations:
            if self.is_feature(operation):
                found |= operation.weights
        return found

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operations count as its caller's
                continue
            # What hooks of the network's own do to its input is its own work; a module is called with what they make.
            entering = self._entering(path)
            handles.append(module.register_forward_pre_hook(entering, prepend=not path, with_kwargs=True))
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
            # Code that no mode sees (extensions in C++): what it made is one operation of the module.
            if unseen := [value for value in values if value not in self._known]:
                self._record(Call(type(module).__name__, (received, list(module.parameters())), unseen), path)
            self._note("outputs_of", path, values)

        return hook

    def _note(self, side: str, path: str, values: list[Tensor]) -> None:
        """Note a module at the operation that made its first value, and only there: the last call counts."""
        if (earlier := self._noted.pop((side, path), None)) is not None:
            earlier.remove(path)
        number = self._origin(values[0]).number if values else None
        if number is not None and number > INPUT:
            noted: list[str] = getattr(self.operations[number], side)
            noted.append(path)
            self._noted[side, path] = noted

    def _record(self, call: Call, module: str | None = None) -> None:
        if not call.made:
            return
        taken = [(value, known) for value in tensors_in(call.arguments) if (known := self._find(value))]
        inputs = tuple(dict.fromkeys(known.number for _, known in taken if known.number is not None))
        weights = sources = 0
        for _, known in taken:
            weights |= known.weights
            sources |= known.sources
        if not inputs:  # a constant, perhaps made of weights
            for value in call.made:
                self._known[value] = Known(weights=weights)
            return
        number = len(self.operations)
        found = self._axes.made(call, [value for value, known in taken if known.number is not None])
        self.operations.append(
            Operation(
                number,
                call.name,
                module if module is not None else self._entered[-1][0],
                inputs,
                tuple(call.made[0].shape) if len(call.made) == 1 else None,
                found[0] if len(call.made) == 1 else None,
                weights,
                sources,
            )
        )
        for value, layout in zip(call.made, found, strict=True):
            self._known[value] = Known(number, weights, sources, layout)

    def _find(self, value: Tensor) -> Known | None:
        found: Known | None = self._known.get(value)  # type: ignore[no-untyped-call]
        return found

    def _origin(self, value: Tensor) -> Known:
        return self._find(value) or Known()


def _batch(example: tuple[Any, ...]) -> tuple[int, list[tuple[Tensor, bool]]]:
    """The number of images in an example, and its tensors, each with whether it holds the whole batch.

    Images of a list, each (C, H, W), are a batch.
    """
    for argument in example:
        images = argument if isinstance(argument, (list, tuple)) else ()
        if images and all(isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point() for v in images):
            others = [value for other in example if other is not argument for value in tensors_in(other)]
            return len(images), [*((value, False) for value in images), *((value, True) for value in others)]
    values = tensors_in(example)
    image = next((value for value in values if value.ndim > 2 and value.is_floating_point()), None)
    first = image if image is not None else next((value for value in values if value.ndim), None)
    return 0 if first is None else len(first), [(value, True) for value in values]


def traced(
    model: nn.Module,
    example: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    training: bool = False,
    values: bool = True,
) -> Trace:
    """The trace of a pass that leaves the model as it is: of a copy, on tensors that have shapes and no values.

    Where a pass needs values (a number that is computed in it decides what follows), they are those of a copy, or of the
    model itself, whose state is put back.

    Args:
        model: the network, as `Trace` takes it.
        example: its inputs, as `Trace` takes them.
        options: its keyword arguments, as `Trace` takes them.
        training: the mode of the pass, as `Trace` takes it.
        values: whether a pass with values is made where one without fails.

    Raises:
        Exception: whatever the model raises.
    """
    arguments = example, options or {}
    try:
        # PyTorch logs what fails on shapes alone, though that is no more than a try.
        with silent("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with _Shapes(mode):
                copied = copy_of_model(model)
            args, kwargs = tree_map_only(Tensor, lambda value: mode.from_tensor(value).clone(), arguments)
            trace = Trace(copied, args, kwargs, training)
    except Exception:  # anything may fail for want of values
        if not values:
            raise
        with scratch(model) as probe:
            args, kwargs = tree_map_only(Tensor, torch.clone, arguments)
            trace = Trace(probe, args, kwargs, training)
    trace.model = model
    return trace


class _Shapes(TorchFunctionMode):
    """Copies tensors without their values."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.mode.from_tensor(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


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

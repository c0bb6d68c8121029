"""One forward pass as a graph: its operations, the weights behind each, and the values through which everything flows.

Axes: N batch, C channels; the other axes of a value are its positions.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from matchdistill import layout as layouts
from matchdistill.layout import Layout
from matchdistill.probing import evaluating, scratch

INPUT = -1  # the number of the network's first input, which no operation made; -2 is the second's

_CHANNELS_SECOND = frozenset("batch_norm group_norm instance_norm".split())
_CHANNELS_LAST = frozenset("linear layer_norm rms_norm embedding".split())
# What leaves out axes or changes their order; "get" reads a property, mT or T.
_PERMUTING = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis adjoint get t mean sum amax amin logsumexp".split()
)
_RESHAPING = frozenset("reshape view flatten unflatten squeeze unsqueeze reshape_as view_as".split())
_PRODUCTS = frozenset("matmul bmm rmatmul scaled_dot_product_attention multi_head_attention_forward".split())
_JOINING = frozenset("cat concat concatenate".split())


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


class Call(NamedTuple):
    """A call as it is recorded: the function, (args, kwargs), and the tensors that it made or changed."""

    name: str
    arguments: tuple[Any, Any]
    made: list[Tensor]
    function: Callable[..., Any] | None = None


class Known(NamedTuple):
    """What is known of a tensor: the operation that made it (None: it does not depend on the input), and its origins."""

    number: int | None = None
    weights: int = 0
    sources: int = 0
    layout: Layout | None = None


class Trace:
    """The operations of a forward pass that depend on its input, in order of execution.

    The pass runs the model that it is given, in evaluation mode without a graph; `traced` runs a copy.

    Args:
        model: the network.
        example: its positional arguments.

    Attributes:
        model: the network.
        weights: the paths of its parameters, in the order of the bits of `Operation.weights`.
        batch: N of the example.
        inputs: the shapes of the tensors in the example.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.model = model
        self.operations: list[Operation] = []
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._entered: list[tuple[str, Any]] = []
        self._noted: dict[tuple[str, str], list[str]] = {}
        parameters = dict(model.named_parameters())
        self.weights = list(parameters)
        self.sizes = [0 if nn.parameter.is_lazy(value) else value.numel() for value in parameters.values()]
        self.batch, inputs = _batch(example)
        self.inputs = [tuple(value.shape) for value, _ in inputs]
        for buffer in model.buffers():
            self._known[buffer] = Known()
        for bit, parameter in enumerate(parameters.values()):
            self._known[parameter] = Known(weights=1 << bit)
        for bit, (value, whole) in enumerate(inputs):
            self._known[value] = Known(INPUT - bit, 0, 1 << bit, _input_layout(value, whole))
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
        made = [self._known.get(value, Known()).number for value in tensors_in(output)]
        self.outputs = {number for number in made if number is not None}
        self._known = WeakTensorKeyDictionary()

    def made_by(self, number: int) -> Operation | None:
        """The operation of that number; None for the network's input."""
        return None if number <= INPUT else self.operations[number]

    def weights_before(self, operations: Iterable[Operation]) -> set[str]:
        """The paths of the weights that lead to the values of these operations."""
        bits = 0
        for operation in operations:
            bits |= operation.weights
        return {path for number, path in enumerate(self.weights) if bits >> number & 1}

    def elements(self, weights: int) -> int:
        """The number of elements of the weights, given as bits."""
        return sum(size for number, size in enumerate(self.sizes) if weights >> number & 1)

    def taken_by(self, operation: Operation) -> list[Operation]:
        """The operations that take a value."""
        return [other for other in self.operations[operation.number + 1 :] if operation.number in other.inputs]

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
            # Code that no mode sees (extensions in C++): what it made is one operation of the module.
            if unseen := [value for value in values if value not in self._known]:
                self._record(Call(type(module).__name__, (received, list(module.parameters())), unseen), path)
            self._note("outputs_of", path, values)

        return hook

    def _note(self, side: str, path: str, values: list[Tensor]) -> None:
        """Note a module at the operation that made its first value, and only there: the last call counts."""
        if (earlier := self._noted.pop((side, path), None)) is not None:
            earlier.remove(path)
        number = self._known.get(values[0], Known()).number if values else None
        if number is not None and number > INPUT:
            noted: list[str] = getattr(self.operations[number], side)
            noted.append(path)
            self._noted[side, path] = noted

    def _record(self, call: Call, module: str | None = None) -> None:
        if not call.made:
            return
        taken = [(value, known) for value in tensors_in(call.arguments) if (known := self._known.get(value))]
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
        found = self._layouts(call)
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

    def _layout(self, value: Any) -> Layout | None:
        return self._known.get(value, Known()).layout if isinstance(value, Tensor) else None

    def _layouts(self, call: Call) -> list[Layout | None]:
        """The layouts of the tensors that a call has made."""
        try:
            found = [self._layout_of(call, made) for made in call.made]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):  # a form of the call that is not known here
            return [None] * len(call.made)
        shapes = [tuple(made.shape) for made in call.made]
        return [
            layout if layout is not None and layout.shape == shape else None
            for layout, shape in zip(found, shapes, strict=True)
        ]

    def _layout_of(self, call: Call, made: Tensor) -> Layout | None:
        args, kwargs = call.arguments
        shape = tuple(made.shape)
        given = [value for value in tensors_in(call.arguments) if self._known.get(value, Known()).number is not None]
        source, first = given[0], self._layout(given[0])
        if call.name in _JOINING:
            parts = list(args[0])
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(shape)
            return layouts.joined([self._layout(part) for part in parts], [part.shape[dim] for part in parts], dim, shape)
        if call.name == "stack" and first is not None and first.axes and len(given) == self.batch == len(shape[:1] * shape[0]):
            return Layout(((layouts.Part(layouts.BATCH, 1, shape[0]),), *first.axes))
        if call.name in _PRODUCTS:
            rows = args[0] if args else kwargs["query"]
            columns = args[-1] if call.name in ("matmul", "bmm") else kwargs.get("value", args[2] if len(args) > 2 else None)
            if call.name == "rmatmul":
                rows, columns = args[1], args[0]
            fixed = [self._known.get(value, Known()).number is None for value in (rows, columns)]
            both = [self._layout(value) for value in (rows, columns)]
            if any(layout is None and not constant for layout, constant in zip(both, fixed, strict=True)):
                return None
            return layouts.product(*both, shape, 0 if call.name == "multi_head_attention_forward" else -2)
        if call.name == "unfold" and source.ndim == 4 and len(shape) == 3:
            return layouts.product(None, layouts.image_layout(shape, 1), shape, 2)  # patches of places, not places
        if call.name == "fold":
            return layouts.image_layout(shape, 1)
        if call.name.startswith("conv"):
            return self._convolved(first, source, shape)
        if first is None or (call.name == "linear" and self._known[source].number <= INPUT):
            return self._guessed(call.name, shape)
        if call.name == "linear" and first.channel_dim in (None, len(shape) - 1):
            return layouts.contracted(first, shape[-1])
        if call.name in _PERMUTING and call.function is not None:
            # A tensor whose sizes are all different shows where the function puts each axis.
            sizes = list(range(2, 2 + source.ndim))
            order = call.function(torch.empty(sizes, device="meta"), *args[1:], **kwargs).shape
            if set(order) <= set(sizes):
                return layouts.permuted(first, [size - 2 for size in order])
        if call.name in _RESHAPING:
            return layouts.reshaped(first, shape)
        if (dim := _taken(call, source.ndim)) is not None:
            return layouts.without(first, dim)
        same = [layout for value in given if value.shape == made.shape and (layout := self._layout(value))]
        if same:
            return next((layout for layout in same if layout.grid is not None), same[0])
        return layouts.resized(first, shape)

    def _convolved(self, layout: Layout | None, source: Tensor, shape: tuple[int, ...]) -> Layout | None:
        if layout is None or source.ndim != len(layout.axes):
            return layouts.image_layout(shape, 1) if shape[0] == self.batch else None
        channels = layouts.image_layout(shape, 1).axes[1]
        places = (layouts.scaled(axis, size, number) for number, (axis, size) in enumerate(zip(layout.axes[2:], shape[2:], strict=True)))
        return Layout((layout.axes[0], channels, *places))

    def _guessed(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """By what the operation expects; None where it expects nothing, or where tokens come from maps in an unknown way."""
        if len(shape) < 3 or shape[0] != self.batch:
            return None
        if len(shape) == 3 and any(o.layout is not None and o.layout.grid is not None for o in self.operations):
            return None
        if name in _CHANNELS_SECOND:
            return layouts.image_layout(shape, 1)
        return layouts.image_layout(shape, len(shape) - 1) if name in _CHANNELS_LAST else None


def _taken(call: Call, axes: int) -> int | None:
    """The axis of which the call takes a single element; None where it does something else."""
    args, kwargs = call.arguments
    if call.name in ("unbind", "select"):
        return int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % axes
    if call.name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(item is None or isinstance(item, Tensor) for item in index):
            return None
        numbers = [place for place, item in enumerate(index) if isinstance(item, int)]
        if len(numbers) == 1:
            behind = Ellipsis in index[: numbers[0]]
            return numbers[0] - len(index) + axes if behind else numbers[0]
    return None


def _batch(example: tuple[Any, ...]) -> tuple[int, list[tuple[Tensor, bool]]]:
    """The number of images in an example, and its tensors, each with whether it holds the whole batch.

    Images of a list, each (C, H, W), are a batch.
    """
    for argument in example:
        if isinstance(argument, (list, tuple)) and argument and all(isinstance(v, Tensor) for v in argument):
            if all(value.ndim == 3 and value.is_floating_point() for value in argument):
                others = [value for other in example if other is not argument for value in tensors_in(other)]
                return len(argument), [*((value, False) for value in argument), *((value, True) for value in others)]
    values = tensors_in(example)
    image = next((value for value in values if value.ndim > 2 and value.is_floating_point()), None)
    first = image if image is not None else next((value for value in values if value.ndim), None)
    return 0 if first is None else len(first), [(value, True) for value in values]


def _input_layout(value: Tensor, whole: bool) -> Layout | None:
    """Of an image as it is given; None for other inputs."""
    if not whole:
        return layouts.image_layout(value.shape, 0, batch=False)
    if value.ndim < 4 or not value.is_floating_point():
        return None
    few = [axis for axis in (1, value.ndim - 1, 2) if value.shape[axis] <= 4]
    return layouts.image_layout(value.shape, few[0] if few else 1)


def traced(model: nn.Module, example: tuple[Any, ...]) -> Trace:
    """The trace of a pass that leaves the model as it is: of a copy, on tensors that have shapes and no values.

    Where a pass needs values (a number that is computed in it decides what follows), they are those of a copy, or of the
    model itself, whose state is put back.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # type: ignore[no-untyped-call]
            with _Shapes(mode):
                copied = copy.deepcopy(model)
            trace = Trace(copied, tree_map_only(Tensor, lambda value: mode.from_tensor(value).clone(), example))
    except Exception as error:
        if not _needs_values(error):
            raise
        with scratch(model) as probe:
            trace = Trace(probe, tree_map_only(Tensor, torch.clone, example))
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


def _needs_values(error: BaseException) -> bool:
    """Whether a pass may fail for want of values alone."""
    return True


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

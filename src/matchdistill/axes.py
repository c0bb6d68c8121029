"""Where the axes of a value go: the layout of what a call makes, from the layouts of what it takes.

Axes: N batch, C channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matchdistill import layout as layouts
from matchdistill.layout import Layout

INPUT = -1  # the number of the network's first input, which no operation made; -2 is the second's

_CHANNELS_SECOND = frozenset("batch_norm group_norm instance_norm".split())
_CHANNELS_LAST = frozenset("linear layer_norm rms_norm embedding".split())
# What leaves out axes or changes their order; "get" reads a property, mT or T.
_PERMUTING = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis adjoint get t mean sum amax amin max min logsumexp".split()
)
_RESHAPING = frozenset("reshape view flatten unflatten squeeze unsqueeze reshape_as view_as".split())
_MATRIX_PRODUCTS = frozenset("matmul bmm rmatmul".split())
_ATTENTION = frozenset("scaled_dot_product_attention multi_head_attention_forward".split())
_JOINING = frozenset("cat concat concatenate".split())


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


def input_layout(value: Tensor, whole: bool = True) -> Layout | None:
    """Of an image as the network is given it, a batch or a single one; None for other inputs."""
    if not whole:
        return layouts.image_layout(value.shape, 0, batch=False)
    if value.ndim < 4 or not value.is_floating_point():
        return None
    few = [axis for axis in (1, value.ndim - 1, 2) if value.shape[axis] <= 4]
    return layouts.image_layout(value.shape, few[0] if few else 1)


class Axes:
    """Follows the axes of a pass.

    Args:
        batch: N of the pass.
        known: what is known of a tensor.
    """

    def __init__(self, batch: int, known: Callable[[Tensor], Known]) -> None:
        self._batch, self._known = batch, known
        self._placed = False  # whether some value's positions are known

    def made(self, call: Call, given: list[Tensor]) -> list[Layout | None]:
        """The layouts of the tensors that a call has made; None where they are unknown.

        Args:
            call: the call.
            given: its arguments that depend on the network's input.
        """
        found: list[Layout | None] = []
        for made in call.made:
            try:
                layout = self._of(call, given, tuple(made.shape))
            except (
                RuntimeError,
                TypeError,
                ValueError,
                IndexError,
                KeyError,
            ):  # a form of the call that is not known here
                layout = None
            found.append(layout if layout is not None and layout.shape == tuple(made.shape) else None)
        self._placed = self._placed or any(layout is not None and layout.grid is not None for layout in found)
        return found

    def _layout(self, value: Any) -> Layout | None:
        return self._known(value).layout if isinstance(value, Tensor) else None

    def _of(self, call: Call, given: list[Tensor], shape: tuple[int, ...]) -> Layout | None:
        args, kwargs = call.arguments
        source, layout = given[0], self._layout(given[0])
        if call.name in _JOINING:
            parts, dim = list(args[0]), kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(shape)
            return layouts.joined(
                [self._layout(part) for part in parts], [part.shape[dim] for part in parts], dim, shape
            )
        if call.name == "stack":
            return layouts.stacked([self._layout(value) for value in given]) if len(given) == self._batch else None
        if call.name in _MATRIX_PRODUCTS:
            rows, columns = args[:2] if call.name != "rmatmul" else args[1::-1]
            return self._product(rows, columns, shape)
        if call.name in _ATTENTION:
            rows, _, columns = (*args, kwargs.get("query"), kwargs.get("key"), kwargs.get("value"))[:3]
            return self._product(rows, columns, shape, 0 if call.name == "multi_head_attention_forward" else -2)
        if call.name == "unfold" and source.ndim == 4 and len(shape) == 3:
            return layouts.reshaped(
                layouts.image_layout((*shape[:2], *_patches(source.shape[2:], *args[1:], **kwargs)), 1), shape
            )
        if call.name == "fold":
            return layouts.image_layout(shape, 1)
        if call.name.startswith("conv"):
            return self._convolved(layout, source, shape)
        if layout is None or (call.name == "linear" and (self._known(source).number or 0) <= INPUT):
            return self._guessed(call.name, shape)
        return self._changed(call, given, layout, shape)

    def _changed(self, call: Call, given: list[Tensor], layout: Layout, shape: tuple[int, ...]) -> Layout | None:
        """Of what has the axes of the first tensor given, perhaps fewer, others or in another order."""
        args, kwargs = call.arguments
        axes = len(layout.axes)
        if call.name == "linear" and layout.channel_dim in (None, len(shape) - 1):
            return layouts.contracted(layout, shape[-1])
        if call.name in _PERMUTING and call.function is not None and len(given) == 1:
            # A tensor whose sizes are all different shows where the function puts each axis.
            sizes = list(range(2, 2 + axes))
            made = call.function(torch.empty(sizes, device="meta"), *args[1:], **kwargs)
            order = (made[0] if isinstance(made, tuple) else made).shape
            if set(order) <= set(sizes):
                return layouts.permuted(layout, [size - 2 for size in order])
        if call.name in _RESHAPING:
            return layouts.reshaped(layout, shape)
        if (dim := _taken(call, axes)) is not None:
            return layouts.without(layout, dim)
        alike = [same for value in given if value.shape == shape and (same := self._layout(value)) is not None]
        if alike:
            return next((same for same in alike if same.grid is not None), alike[0])
        return layouts.resized(layout, shape)

    def _product(self, rows: Any, columns: Any, shape: tuple[int, ...], row_dim: int = -2) -> Layout | None:
        both = self._layout(rows), self._layout(columns)
        for value, layout in zip((rows, columns), both, strict=True):
            if layout is None and self._known(value).number is not None:
                return None
        return layouts.product(*both, shape, row_dim)

    def _convolved(self, layout: Layout | None, source: Tensor, shape: tuple[int, ...]) -> Layout | None:
        fresh = layouts.image_layout(shape, 1)
        if layout is None or source.ndim != len(layout.axes):
            return fresh if shape[0] == self._batch else None
        places = zip(layout.axes[2:], shape[2:], strict=True)
        scaled = (layouts.scaled(axis, size, number) for number, (axis, size) in enumerate(places))
        return Layout((layout.axes[0], fresh.axes[1], *scaled))

    def _guessed(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """By what the operation expects; None where it expects nothing, or where tokens come from maps in an unknown way."""
        if len(shape) < 3 or shape[0] != self._batch or (len(shape) == 3 and self._placed):
            return None
        if name in _CHANNELS_SECOND:
            return layouts.image_layout(shape, 1)
        return layouts.image_layout(shape, len(shape) - 1) if name in _CHANNELS_LAST else None


def _patches(
    size: Sequence[int], kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> tuple[int, ...]:
    """The numbers of patches along the axes of an image, of `torch.nn.functional.unfold`."""
    options = (
        value if isinstance(value, (tuple, list)) else (value, value)
        for value in (kernel_size, dilation, padding, stride)
    )
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in zip(size, *options, strict=True))


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

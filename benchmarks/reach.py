"""What leads to a value of a real forward pass: the independent judge of the taps that the library chooses.

Nothing here knows the library's trace. Values are taken by plain hooks, and what leads to them is read from autograd's own
graph: the parameters whose gradient a backward pass from the value would set.

Axes: N batch, C channels, T tokens, P positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

TOKENS = 8  # so many class, register and distillation tokens at most lie beside those of a map


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and model outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if hasattr(value, "decompose"):  # nested tensors with masks, of detectors
        value = value.decompose()
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def leading_to(values: Sequence[Tensor]) -> set[int]:
    """The identities of the parameters that lead to any of the values: autograd would give them a gradient."""
    found: set[int] = set()
    queue: list[Any] = []
    for value in values:
        if value.grad_fn is not None:
            queue.append(value.grad_fn)
        elif value.requires_grad:
            found.add(id(value))
    seen = set(queue)
    while queue:
        node = queue.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return found


@dataclass(frozen=True)
class Value:
    """A value of a pass.

    Attributes:
        name: the module that returned it.
        shape: of the tensor.
        sizes: of its position axes.
        parameters: identities of those that lead to it.
    """

    name: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    parameters: frozenset[int]

    @property
    def positions(self) -> int:
        """P, per channel."""
        return math.prod(self.sizes)


def position_sizes(shape: Sequence[int], channels: int | None = None, sequence: bool = False) -> tuple[int, ...]:
    """The sizes of the position axes of a value (N, *).

    Args:
        shape: of the value.
        channels: their number where it is known; it tells (N, C, H, W) from (N, H, W, C).
        sequence: values of three axes are (N, C, L), not (N, T, C).

    Examples:
        >>> position_sizes((2, 64, 7, 7)), position_sizes((2, 7, 7, 64)), position_sizes((2, 50, 64))
        ((7, 7), (7, 7), (50,))
    """
    first, last = shape[1], shape[-1]
    if len(shape) == 3:
        is_last = not sequence and channels in (None, last)
    elif channels is not None and first != last:
        is_last = channels == last
    else:  # two of the axes of a square map are equal
        is_last = shape[-3] == shape[-2] != last
    return tuple(shape[1:-1] if is_last else shape[2:])


@contextlib.contextmanager
def returned(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the modules return in their last call within the block."""
    values: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A copy: what follows may change the tensor in place, and with it what leads to it.
            values[path] = [tensor.view_as(tensor).clone() for tensor in tensors_of(output)]

        return hook

    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_hook(keep(path)) for path in paths]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def last_of_each_size(values: Sequence[Value]) -> list[Value]:
    """Of consecutive values with equally many positions the last: the ends of the stages."""
    return [
        value
        for value, after in zip(values, [*values[1:], None], strict=True)
        if after is None or not same_size(value, after)
    ]


def same_size(first: Value, second: Value) -> bool:
    """Whether two values lie on one map: about as many positions; tokens may have a few more than the map."""
    slack = TOKENS if 1 in (len(first.sizes), len(second.sizes)) else 0
    smaller, larger = sorted((first.positions, second.positions))
    return larger < 1.5 * smaller or larger - smaller <= slack

"""Taps: where features are taken.

Axes: N batch, C channels, T tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from matchdistill.encoder import Dominators
from matchdistill.layout import image_layout
from matchdistill.messages import did_you_mean, listed
from matchdistill.trace import Operation, Trace

Side = Literal["input", "output"]

ADDING = frozenset("add iadd radd".split())
# What a value may pass on its way from a batch norm and still be that norm's output, or a sum with it.
_KEEPING = ADDING | frozenset("dropout dropout2d stochastic_depth clone contiguous to permute transpose".split())


@dataclass(frozen=True)
class Tap:
    """A place to take features: the input or the output of a module, at its last call in a forward pass.

    "Before the activation" is the input of the activation module. Where the activation is a function, ``F.relu(x + y)``, it
    is the sum of two such places.

    Args:
        module: path as in ``named_modules()``, "layer1.2.relu"; "" is the model itself.
        side: "input" or "output".
        channel_dim: axis of the channels; None: as seen in the forward pass, else the last of (N, T, C) tokens and the
            second of anything else.
        reason: why it was chosen.
        plus: the place of what the network adds to the value; None: the value itself.

    Raises:
        ValueError: an unknown side, or a sum of more than two.

    Examples:
        >>> Tap.parse("layer1.2.relu:input")
        Tap(module='layer1.2.relu', side='input', channel_dim=None)
        >>> str(Tap("layer1"))
        'layer1:output'
        >>> str(Tap.parse("res2.0.conv2 + res2.0:input"))
        'res2.0.conv2:output + res2.0:input'
    """

    module: str
    side: Side = "output"
    channel_dim: int | None = None
    reason: str = field(default="given", compare=False, repr=False)
    plus: Tap | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"unknown side {self.side!r} of tap {self.module!r}: expected 'input' or 'output'")
        if self.plus is not None and self.plus.plus is not None:
            raise ValueError(f"tap {self} is a sum of more than two: expected the two that the network adds at once")

    def __str__(self) -> str:
        return f"{self.module}:{self.side}" + (f" + {self.plus}" if self.plus else "")

    @classmethod
    def parse(cls, text: str) -> Tap:
        """A tap from "path", "path:input" or "path:output", or the sum of two of them, "path + path:input"."""
        first, _, second = text.partition(" + ")
        module, _, side = first.partition(":")
        return cls(module, side or "output", plus=Tap.parse(second) if second else None)  # type: ignore[arg-type]

    def within(self, path: str) -> Tap:
        """The same place in a larger model that has the model of this tap at a path."""
        module = f"{path}.{self.module}" if self.module else path
        return replace(self, module=module, plus=self.plus and self.plus.within(path))


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, seen through the wrappers of `torch.compile` and of (Distributed)DataParallel.

    Raises:
        ValueError: no such module; the nearest names are suggested.
    """
    modules: dict[str, nn.Module] = dict(unwrapped(model).named_modules())
    if path not in modules:
        hint = did_you_mean(path, modules) or f": expected one of {listed(name for name in modules if name)}"
        raise ValueError(f"{type(unwrapped(model)).__name__} has no module {path!r}{hint}")
    return modules[path]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `torch.compile` and of (Distributed)DataParallel."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    if isinstance(model, torch._dynamo.OptimizedModule):
        return unwrapped(model._orig_mod)
    return model


def tapped_operation(trace: Trace, model: nn.Module, tap: Tap) -> Operation:
    """The operation that makes the value of a tap, with the channels where the tap says they are.

    Raises:
        ValueError: no such module, or the forward pass does not reach it, or its value is not a single tensor (N, C, *),
            or has no such channel axis; or the forward pass does not add what a sum consists of.
    """
    operation = _sum(trace, model, tap) if tap.plus is not None else _single(trace, model, tap)
    if tap.channel_dim is None or tap.channel_dim == operation.channel_dim:
        return operation
    assert operation.shape is not None
    axes = len(operation.shape)
    if not -axes <= tap.channel_dim < axes or tap.channel_dim % axes == 0:
        raise ValueError(
            f"channel_dim={tap.channel_dim} of tap {tap} is no channel axis of its value {operation.shape}: "
            f"expected 1 to {axes - 1}, axis 0 is the batch"
        )
    return replace(operation, layout=image_layout(operation.shape, tap.channel_dim % axes))


def _single(trace: Trace, model: nn.Module, tap: Tap) -> Operation:
    resolve(model, tap.module)
    for operation in reversed(trace.operations):
        if tap.module in (operation.inputs_of if tap.side == "input" else operation.outputs_of):
            if operation.shape is None or len(operation.shape) < 2:
                break
            return operation
    raise ValueError(
        f"the forward pass of {type(model).__name__} gives no single feature tensor (N, C, *) at the {tap.side} of "
        f"{tap.module!r}: choose a module that it calls with, or that returns, one"
    )


def _sum(trace: Trace, model: nn.Module, tap: Tap) -> Operation:
    assert tap.plus is not None
    addends = {_single(trace, model, tap).number, _single(trace, model, tap.plus).number}
    for operation in trace.operations:
        if operation.name in ADDING and len(operation.inputs) == 2 and set(operation.inputs) == addends:
            return operation
    raise ValueError(f"the forward pass of {type(model).__name__} does not add the two values of tap {tap}")


def margin_source(trace: Trace, operation: Operation) -> str | None:
    """Path of the batch norm whose scale and shift describe the value; None where it has to be measured.

    It is the first of the same width on the way back through the sums of the last block, as in a residual stage the last
    norm of its branch. The norm of an earlier block says nothing of what the later ones have added.
    """
    source = (operation.sources & -operation.sources).bit_length() - 1  # the first that leads to it
    ends = {cut.number for cut in Dominators(trace, source).chain(operation) if len(cut.inputs) > 1}
    queue, seen = deque([(operation, False)]), set()
    while queue:
        current, past_end = queue.popleft()
        shape = current.shape or ()
        if current.number in seen or len(shape) < 2 or current.channels != operation.channels:
            continue
        seen.add(current.number)
        if current.name == "batch_norm" and _has_scale(resolve(trace.model, current.module), current.channels):
            return current.module
        if current.name in _KEEPING and not (past_end and current.number in ends):
            past_end = past_end or current.number in ends
            queue.extend((maker, past_end) for number in current.inputs if (maker := trace.made_by(number)) is not None)
    return None


def _has_scale(norm: nn.Module, channels: int) -> bool:
    """Whether a module that runs a batch norm holds its scale and shift, under their usual names.

    Buffers are those of a frozen norm, into which its statistics may be folded: they say nothing of the value.
    """
    held = [getattr(norm, name, None) for name in ("weight", "bias")]
    return all(isinstance(values, nn.Parameter) and values.shape == (channels,) for values in held)

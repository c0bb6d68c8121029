"""Taps: where features are taken, and the automatic choice of them.

Axes: N batch, C channels, T tokens, P positions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.messages import cause, did_you_mean
from matchdistill.trace import Operation, Trace, tensors_in

Side = Literal["input", "output"]

_ACTIVATIONS = frozenset(
    "relu relu6 hardtanh leaky_relu prelu rrelu elu celu selu gelu silu mish hardswish softplus threshold tanh".split()
)
_ADDING = frozenset("add iadd radd".split())
# What a value may pass on its way from a batch norm and still be that norm's output, or a sum with it.
_KEEPING = _ADDING | frozenset("dropout dropout2d stochastic_depth clone contiguous to permute transpose".split())
_REARRANGING = frozenset("view reshape transpose permute contiguous flatten channel_shuffle dropout".split())
_COMPUTING = frozenset("conv1d conv2d conv3d linear batch_norm layer_norm group_norm".split())
# Sizes this much apart count as one resolution: a valid convolution or a class token, not a stride.
_SAME_RESOLUTION = 1.5


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
        hint = did_you_mean(path, modules) or f": expected one of {_listed(name for name in modules if name)}"
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
    if tap.channel_dim is None:
        return operation
    assert operation.shape is not None
    axes = len(operation.shape)
    if not -axes <= tap.channel_dim < axes or tap.channel_dim % axes == 0:
        raise ValueError(
            f"channel_dim={tap.channel_dim} of tap {tap} is no channel axis of its value {operation.shape}: "
            f"expected 1 to {axes - 1}, axis 0 is the batch"
        )
    return replace(operation, channel_dim=tap.channel_dim % axes)


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
        if operation.name in _ADDING and len(operation.inputs) == 2 and set(operation.inputs) == addends:
            return operation
    raise ValueError(f"the forward pass of {type(model).__name__} does not add the two values of tap {tap}")


def margin_source(trace: Trace, operation: Operation) -> str | None:
    """Path of the batch norm whose scale and shift describe the value; None where it has to be measured.

    It is the first of the same width on the way back through the sums of the last block, as in a residual stage the last
    norm of its branch. The norm of an earlier block says nothing of what the later ones have added.
    """
    ends = {cut.number for cut in trace.cuts() if len(cut.inputs) > 1}
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


@dataclass(frozen=True)
class Candidate:
    """A possible position: its tap and the operation that makes the value."""

    tap: Tap
    operation: Operation


def candidates(trace: Trace) -> list[list[Candidate]]:
    """The candidates of every resolution, finest first; the last of each list is the one to prefer.

    Candidates are cuts of the forward pass, values through which everything flows. Where a resolution has a cut that is
    an activation, they are the values before such; else the sums and concatenations that close its blocks; else any
    computed value that is a module's output.
    """
    groups: list[list[Operation]] = []
    for cut in trace.cuts():
        if cut.positions < 2:
            continue
        for group in groups:
            ratio = group[0].positions / cut.positions
            if 1 / _SAME_RESOLUTION < ratio < _SAME_RESOLUTION:
                group.append(cut)
                break
        else:
            groups.append([cut])
    found = [chosen for group in groups if (chosen := _of_resolution(trace, group))]
    return sorted(found, key=lambda group: -group[-1].operation.positions)


def _of_resolution(trace: Trace, cuts: list[Operation]) -> list[Candidate]:
    activations = [taken for cut in cuts if cut.name in _ACTIVATIONS and (taken := _before_activation(trace, cut))]
    if activations:
        return activations
    named = [cut for cut in cuts if cut.outputs_of]
    blocks = [cut for cut in named if _closes_block(trace, cut)]
    computed = [cut for cut in named if cut.name in _COMPUTING]
    reason = "end of the last block at its resolution" if blocks else "last value at its resolution"
    return [Candidate(Tap(cut.outputs_of[0], "output", cut.channel_dim, reason), cut) for cut in blocks or computed]


def _closes_block(trace: Trace, cut: Operation) -> bool:
    """Whether the value is a sum or concatenation, perhaps rearranged."""
    operation: Operation | None = cut
    while operation is not None and operation.name in _REARRANGING and len(operation.inputs) == 1:
        operation = trace.made_by(operation.inputs[0])
    return operation is not None and len(operation.inputs) > 1


def _before_activation(trace: Trace, activation: Operation) -> Candidate | None:
    """The tap of an activation's input; of its output where no module is called with, or returns, its input or addends."""
    value = trace.made_by(activation.inputs[0])
    reason = "before the last activation at its resolution"
    if value is not None and value.shape is not None:
        if activation.module in value.inputs_of:
            return Candidate(Tap(activation.module, "input", value.channel_dim, reason), value)
        if value.outputs_of:
            return Candidate(Tap(value.outputs_of[0], "output", value.channel_dim, reason), value)
        if (total := _sum_tap(trace, value, reason)) is not None:
            return Candidate(total, value)
    if activation.outputs_of:
        reason = "after the last activation at its resolution: no module returns the value before it"
        return Candidate(Tap(activation.outputs_of[0], "output", activation.channel_dim, reason), activation)
    return None


def _sum_tap(trace: Trace, value: Operation, reason: str) -> Tap | None:
    """The tap of a sum of two values that modules are called with or return; None for anything else."""
    makers = [trace.made_by(number) for number in value.inputs]
    if value.name not in _ADDING or len(makers) != 2:
        return None
    taps = []
    for maker in makers:
        if maker is None or maker.shape != value.shape or not (maker.outputs_of or maker.inputs_of):
            return None
        taps.append(Tap(maker.outputs_of[0]) if maker.outputs_of else Tap(maker.inputs_of[0], "input"))
    return replace(taps[0], channel_dim=value.channel_dim, reason=reason, plus=taps[1])


def pair_candidates(
    teacher: list[list[Candidate]], student: list[list[Candidate]], limit: int
) -> list[tuple[Candidate, Candidate]]:
    """Pair the candidates of two networks, at most the `limit` deepest, finest first.

    By resolution; a network of a single one (ViT) takes part with blocks at even distances.
    """
    if len(teacher) == 1 or len(student) == 1:
        count = min(limit, *(len(groups[0]) if len(groups) == 1 else len(groups) for groups in (teacher, student)))
        return list(zip(_spread(teacher, count), _spread(student, count), strict=True))
    pairs = []
    for group in student:
        nearest = min(teacher, key=lambda other: _distance(other[-1], group[-1]))
        if _distance(nearest[-1], group[-1]) < math.log(2):
            pairs.append((nearest[-1], group[-1]))
    return pairs[-limit:]


def _distance(first: Candidate, second: Candidate) -> float:
    """How far two resolutions are from each other: the logarithm of their ratio, without its sign."""
    return abs(math.log(first.operation.positions / second.operation.positions))


def _spread(groups: list[list[Candidate]], count: int) -> list[Candidate]:
    if len(groups) > 1:
        return [group[-1] for group in groups[-count:]]
    blocks = groups[0]
    return [blocks[(number + 1) * len(blocks) // count - 1] for number in range(count)]


def find_taps(
    teacher: nn.Module, student: nn.Module, example: Tensor | tuple[Any, ...] | None = None, limit: int = 4
) -> list[tuple[Tap, Tap]]:
    """Choose the positions of two networks from one forward pass of each.

    A position is a value through which everything flows, before the last activation at its resolution (section 4.1 of the
    paper has the positions of its networks; the rule finds those of ResNets, MobileNet-V1 and ShuffleNet-V2). Positions of
    equal resolution are paired.

    Args:
        teacher: the wide network.
        student: the narrow one.
        example: an input of both, (N, C, H, W) or a tuple of arguments; None: images of the size that they ask for.
        limit: the most positions, the deepest are kept.

    Returns:
        (teacher tap, student tap) from the finest to the coarsest resolution, each with its `reason`.

    Raises:
        ValueError: no position was found, or no pair; the candidates are listed. Or a network fails on the example.
    """
    traces = trace_pair(teacher, student, example)
    return [(first.tap, second.tap) for first, second in choose(*traces, limit=limit)]


def choose(teacher: Trace, student: Trace, limit: int = 4) -> list[tuple[Candidate, Candidate]]:
    """The pairs of candidates of two traces.

    Raises:
        ValueError: there is none.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 position")
    groups = candidates(teacher), candidates(student)
    for role, trace, found in zip(("teacher", "student"), (teacher, student), groups, strict=True):
        if not found:
            outputs = dict.fromkeys(path for operation in trace.operations for path in operation.outputs_of if path)
            raise ValueError(
                f"found no position in the {role}: no spatial feature map through which everything flows. Give taps, "
                f"for example outputs of {_listed(outputs)}"
            )
    pairs = pair_candidates(*groups, limit)
    if not pairs:
        lists = [_listed(f"{group[-1].tap} {group[-1].operation.spatial}" for group in found) for found in groups]
        raise ValueError(
            f"no two positions have about the same resolution. Teacher: {lists[0]}. Student: {lists[1]}. Give taps, or an "
            "example of the size that you train with"
        )
    return pairs


def _listed(names: Iterable[str], most: int = 30) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def trace_pair(teacher: nn.Module, student: nn.Module, example: Tensor | tuple[Any, ...] | None) -> tuple[Trace, Trace]:
    """Trace both networks on one example; without one, on images of the first size that both accept.

    Raises:
        ValueError: a network fails on the example, or is a scripted one.
    """
    models = unwrapped(teacher), unwrapped(student)
    for role, model in zip(("teacher", "student"), models, strict=True):
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(f"the {role} is a scripted module, which takes no hooks: give it unscripted")
    if example is not None:
        arguments = example if isinstance(example, tuple) else (example,)
        return _traced(models[0], arguments, "teacher"), _traced(models[1], arguments, "student")
    if any(nn.parameter.is_lazy(parameter) for model in models for parameter in model.parameters()):
        raise ValueError("the first input of a lazy module sets its size: run the networks once, or give example=")
    channels = next((module.in_channels for module in models[1].modules() if isinstance(module, nn.Conv2d)), 3)
    error = None
    for size in _likely_sizes(models):
        images = torch.zeros(2, channels, size, size)
        try:
            return _traced(models[0], (images,), "teacher"), _traced(models[1], (images,), "student")
        except ValueError as failure:
            error = error or failure
    raise ValueError(f"{error}. Give example=, an input that both networks take")


def _traced(model: nn.Module, arguments: tuple[Any, ...], role: str) -> Trace:
    """A trace on the arguments as this model needs them: its device and floating point type."""
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))

    def placed(value: Tensor) -> Tensor:
        return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype, copy=True)

    try:
        return Trace(model, tree_map_only(Tensor, placed, arguments))
    except Exception as failure:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors_in(arguments))
        raise ValueError(
            f"the {role} ({type(model).__name__}) fails on an input of shape {shapes}: {cause(failure)}"
        ) from failure


def _likely_sizes(models: Iterable[nn.Module]) -> list[int]:
    """Image sizes to try: those that the models name (torchvision's ViT, timm's configurations), then common ones."""
    sizes: list[int] = []
    for model in models:
        fixed = getattr(model, "image_size", None)
        named = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        sizes += [size for size in (fixed, named[-1] if named else None) if isinstance(size, int)]
    return list(dict.fromkeys([*sizes, 224, 299, 384, 128, 96, 64, 48, 32, 28, 16, 8]))

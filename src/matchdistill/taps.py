"""Taps: where features are taken, and the automatic choice of them.

Axes: N batch, C channels, T tokens, P positions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.encoder import Dominators, Encoder, arranged, closes_block, encoders, is_feature, layers, leading, level, same_resolution, within
from matchdistill.layout import image_layout
from matchdistill.messages import cause, did_you_mean
from matchdistill.trace import INPUT, Operation, Trace, tensors_in, traced

Side = Literal["input", "output"]

_ACTIVATIONS = frozenset(
    "relu relu6 hardtanh leaky_relu prelu rrelu elu celu selu gelu silu mish hardswish softplus threshold tanh".split()
)
_ADDING = frozenset("add iadd radd".split())
# What a value may pass on its way from a batch norm and still be that norm's output, or a sum with it.
_KEEPING = _ADDING | frozenset("dropout dropout2d stochastic_depth clone contiguous to permute transpose".split())
# A stage's position has at least this share of the stage's weights behind it, if any value has.
_ENOUGH = 0.6
# Of the encoder's weights, what a resolution that lies on branches alone has at least; what a block does within it is less.
_BRANCH = 0.0005
_COMPUTING = frozenset("conv1d conv2d conv3d linear batch_norm layer_norm group_norm".split())


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
        if operation.name in _ADDING and len(operation.inputs) == 2 and set(operation.inputs) == addends:
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


@dataclass(frozen=True)
class Candidate:
    """A possible position: its tap, the operation that makes the value, and the share of the layers before it."""

    tap: Tap
    operation: Operation
    depth: float = 1.0
    closes_block: bool = False

    @property
    def in_order(self) -> bool:
        """Whether its positions lie as they lie in the image, as far as is known."""
        return self.operation.layout is None or self.operation.layout.in_order


def candidates(encoder: Encoder) -> list[list[Candidate]]:
    """The candidates of every stage, finest first; the last of each list is the one to prefer.

    They are values through which everything flows, at the ends of blocks (sums and concatenations) and before activations.
    Where a stage has neither, they are any computed values that are modules' outputs. Where its weights lead past all of
    these (branches of several resolutions, cells that are used twice), it is the end of a block to which the most lead.
    """
    found: list[list[Candidate]] = []
    before = 0  # the weights that lead to the stages so far
    for stage in _resolutions(encoder):
        chosen = _of_stage(encoder, stage) if stage[0].number in encoder.through else []
        chosen = _completed(encoder, stage, chosen, before)
        if chosen:
            before |= chosen[-1].operation.weights
            found.append(chosen)
    depths = layers(encoder.trace)
    most = max((depths[stage[-1].operation.number] for stage in found), default=1)
    found = [[replace(one, depth=depths[one.operation.number] / most) for one in stage] for stage in found]
    return _without_stem(encoder, found)


def _resolutions(encoder: Encoder) -> list[list[Operation]]:
    """The encoder's stages, and those of other resolutions that its branches have, finest first."""
    stages = list(encoder.stages)
    for operation in leading(encoder):
        if closes_block(encoder.trace, operation) and not any(same_resolution(s[0], operation) for s in stages):
            stages.append([operation])
    return sorted(stages, key=lambda stage: -level(stage[0]))


def _of_stage(encoder: Encoder, stage: list[Operation]) -> list[Candidate]:
    trace = encoder.trace
    ends: dict[int, Candidate] = {}
    for value in stage:
        found = None
        if value.name in _ACTIVATIONS:
            found = _before_activation(trace, value)
        elif value.outputs_of and closes_block(trace, value):
            tap = Tap(_name(value), "output", value.channel_dim, "end of the last block at its resolution")
            found = Candidate(tap, value)
        if found is not None and is_feature(trace, found.operation):
            root = arranged(trace, found.operation).number
            if root not in ends or not ends[root].in_order:
                ends[root] = replace(found, closes_block=closes_block(trace, found.operation))
    if ends:
        found = [ends[number] for number in sorted(ends)]
        return [*found, *_stage_output(encoder, stage, found[-1])]
    reason = "last value at its resolution"
    return [
        Candidate(Tap(_name(value), "output", value.channel_dim, reason), value)
        for value in stage
        if value.outputs_of and value.name in _COMPUTING
    ]


def _stage_output(encoder: Encoder, stage: list[Operation], end: Candidate) -> list[Candidate]:
    """What the module of the stage, or of its last block, returns if a layer follows the end that was found."""
    others = [other[0].module for other in encoder.stages if other is not stage]
    others = others or [encoder.stages[0][0].module]
    for value in reversed(stage):
        if value.number <= end.operation.number or value.weights == end.operation.weights:
            break
        for path in value.outputs_of:
            inside = within(end.operation.module, path) and path not in end.operation.outputs_of
            if inside and not any(within(other, path) for other in others):
                return [Candidate(Tap(path, "output", value.channel_dim, "output of the last block"), value)]
    return []


def _name(value: Operation) -> str:
    """The module that returns a value: the innermost that has made it, before those that pass it on."""
    return next((path for path in value.outputs_of if within(value.module, path)), value.outputs_of[0])


def _completed(encoder: Encoder, stage: list[Operation], found: list[Candidate], before: int) -> list[Candidate]:
    """With the end of the block to which the most of the stage's weights lead, where too few lead to what was found."""
    trace = encoder.trace
    values = [value for value in leading(encoder) if same_resolution(stage[0], value)]
    own = 0
    for value in values:
        own |= value.weights & ~before
    covered = found[-1].operation.weights if found else 0
    whole = trace.elements(own)
    if trace.elements(own & covered) >= _ENOUGH * whole or (not found and whole < _BRANCH * trace.elements(encoder.deepest.weights)):
        return found
    best = covered
    for value in values:
        if closes_block(trace, value) and trace.elements(own & value.weights) > trace.elements(own & best):
            if (candidate := _at(trace, value)) is not None:
                best, found = value.weights, [*found, replace(candidate, closes_block=True)]
    return found


def _at(trace: Trace, value: Operation) -> Candidate | None:
    """The tap of a value, before the activation that follows where there is one."""
    reason = "end of the block to which most of the weights at its resolution lead"
    for path in value.inputs_of:
        following = next((o for o in trace.operations if value.number in o.inputs and o.module == path), None)
        if following is not None and following.name in _ACTIVATIONS:
            return Candidate(Tap(path, "input", value.channel_dim, reason), value)
    if value.outputs_of:
        return Candidate(Tap(_name(value), "output", value.channel_dim, reason), value)
    if (total := _sum_tap(trace, value, reason)) is not None:
        return Candidate(total, value)
    return Candidate(Tap(value.inputs_of[0], "input", value.channel_dim, reason), value) if value.inputs_of else None


def _without_stem(encoder: Encoder, stages: list[list[Candidate]]) -> list[list[Candidate]]:
    """The last stage alone where the network is one of a single resolution behind a stem that reduces the image.

    The stem has no blocks, or it is a convolutional network before a transformer that holds most of the weights.
    """
    if len(stages) < 2:
        return stages
    blocks = [sum(one.closes_block for one in stage) for stage in stages]
    tokens = [all(len(one.operation.shape or ()) == 3 for one in stage) for stage in stages]
    whole, stem = (encoder.trace.elements(stages[place][-1].operation.weights) for place in (-1, -2))
    if blocks[-1] < 4 or stem > whole / 2:
        return stages
    if sum(blocks[:-1]) == 0 or (tokens[-1] and not any(tokens[:-1]) and blocks[-1] >= 0.4 * sum(blocks)):
        return stages[-1:]
    return stages


def _before_activation(trace: Trace, activation: Operation) -> Candidate | None:
    """The tap of an activation's input; of its output where no module is called with, or returns, its input or addends."""
    value = trace.made_by(activation.inputs[0])
    reason = "before the last activation at its resolution"
    if value is not None and value.shape is not None:
        if activation.module in value.inputs_of:
            return Candidate(Tap(activation.module, "input", value.channel_dim, reason), value)
        if value.outputs_of:
            return Candidate(Tap(_name(value), "output", value.channel_dim, reason), value)
        if (total := _sum_tap(trace, value, reason)) is not None:
            return Candidate(total, value)
    if activation.outputs_of:
        reason = "after the last activation at its resolution: no module returns the value before it"
        return Candidate(Tap(_name(activation), "output", activation.channel_dim, reason), activation)
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
        taps.append(Tap(_name(maker)) if maker.outputs_of else Tap(maker.inputs_of[0], "input"))
    return replace(taps[0], channel_dim=value.channel_dim, reason=reason, plus=taps[1])


def pair_candidates(
    teacher: list[list[Candidate]], student: list[list[Candidate]], limit: int
) -> list[tuple[Candidate, Candidate]]:
    """Pair the candidates of two networks, at most the `limit` deepest, finest first.

    By resolution. Where one is of a single resolution (ViT), and for stages of the student that are coarser than all of the
    teacher's, by the share of the layers before them.
    """
    if len(teacher) == len(student) == 1:
        count = min(limit, len(teacher[0]), len(student[0]))
        return list(zip(_spread(teacher[0], count), _spread(student[0], count), strict=True))
    if len(student) == 1:
        ends = [stage[-1] for stage in teacher][-min(limit, len(student[0])) :]
        return list(zip(ends, _alike(student[0], ends), strict=True))
    ends = [stage[-1] for stage in student][-limit:]
    if len(teacher) == 1:
        ends = ends[-len(teacher[0]) :]
        return list(zip(_alike(teacher[0], ends), ends, strict=True))
    pairs = []
    last = teacher[-1]
    deep = [end for end in ends if _same_size(last[-1], end) or level(end.operation) < level(last[-1].operation)]
    for end in ends[: len(ends) - len(deep)]:
        nearest = min(teacher, key=lambda stage: _distance(stage[-1], end))
        if _same_size(nearest[-1], end):
            pairs.append((nearest[-1], end))
    if not pairs and not any(_same_size(last[-1], end) for end in deep):
        return []
    deep = deep[-len(last) :]
    return [*pairs, *zip(_alike(last, deep), deep, strict=True)]


def _distance(first: Candidate, second: Candidate) -> float:
    """How far two resolutions are from each other: the logarithm of their ratio, without its sign."""
    return abs(math.log(level(first.operation) / level(second.operation)))


def _same_size(first: Candidate, second: Candidate) -> bool:
    return _distance(first, second) < math.log(2)


def _spread(blocks: list[Candidate], count: int) -> list[Candidate]:
    return [blocks[(number + 1) * len(blocks) // count - 1] for number in range(count)]


def _alike(blocks: list[Candidate], ends: Sequence[Candidate]) -> list[Candidate]:
    """Of the blocks, one for each of the ends, in their order, each with about the same share of the layers before it.

    The last goes with the last.
    """
    chosen: list[Candidate] = []
    most = len(blocks) - 1
    for left, end in zip(range(len(ends) - 1, -1, -1), reversed(ends), strict=True):
        places = range(left, most + 1) if chosen else [most]
        place = min(places, key=lambda place: abs(blocks[place].depth - end.depth))
        reason = blocks[place].tap.reason if place == len(blocks) - 1 else "block at the same depth"
        chosen.append(replace(blocks[place], tap=replace(blocks[place].tap, reason=reason)))
        most = place - 1
    return chosen[::-1]


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
    groups = [
        [found for encoder in encoders(trace) if (found := candidates(encoder))] for trace in (teacher, student)
    ]
    for role, trace, found in zip(("teacher", "student"), (teacher, student), groups, strict=True):
        if not found:
            outputs = dict.fromkeys(path for operation in trace.operations for path in operation.outputs_of if path)
            raise ValueError(
                f"found no position in the {role}: no spatial feature map through which everything flows. Give taps, "
                f"for example outputs of {_listed(outputs)}"
            )
    pairs = [pair for both in zip(*groups, strict=False) for pair in pair_candidates(*both, limit)]
    if not pairs:
        lists = [_listed(f"{stage[-1].tap} {stage[-1].operation.grid}" for stage in found[0]) for found in groups]
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
        return traced(model, tree_map_only(Tensor, placed, arguments))
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

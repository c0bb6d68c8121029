"""The encoder of a traced network: the values on the way to its deepest feature, in stages of one resolution.

A position of distillation is a value through which everything flows that makes the deepest feature. Side exits, to the
decoder of a U-Net or a pyramid's levels, do not matter.

Axes: N batch, C channels, T tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from matchdistill.axes import INPUT
from matchdistill.trace import Operation, Trace

# Sizes this much apart count as one resolution: a valid convolution or a class token, not a stride.
SAME_RESOLUTION = 1.5
ACTIVATIONS = frozenset(
    "relu relu6 hardtanh leaky_relu prelu rrelu elu celu selu gelu silu mish hardswish softplus threshold tanh".split()
)
_REARRANGING = frozenset("view reshape transpose permute contiguous flatten channel_shuffle dropout".split())
_INSIDE = frozenset("mul imul div where matmul bmm scaled_dot_product_attention multi_head_attention_forward".split())
_LAYERS = frozenset("conv1d conv2d conv3d convolution linear matmul bmm scaled_dot_product_attention".split())


@dataclass
class Encoder:
    """The way from an input of the network to its deepest feature.

    Attributes:
        trace: the pass.
        stages: the values through which everything flows, by resolution, in their order.
        inside: numbers of all operations that lead to the deepest feature.
    """

    trace: Trace
    stages: list[list[Operation]] = field(default_factory=list)
    inside: set[int] = field(default_factory=set)

    @property
    def through(self) -> set[int]:
        """Numbers of the values in the stages."""
        return {operation.number for stage in self.stages for operation in stage}

    @property
    def deepest(self) -> Operation:
        """The last value."""
        return self.stages[-1][-1]


def level(operation: Operation) -> int:
    """The number of positions in the last two axes of the image: strides in time make no other resolution."""
    return math.prod(operation.grid[-2:])


def same_resolution(first: Operation, second: Operation) -> bool:
    """Whether two values of one network lie in one stage."""
    return 1 / SAME_RESOLUTION < level(first) / level(second) < SAME_RESOLUTION


class Dominators:
    """For each operation that an input leads to, the last value before it through which everything flows on the way.

    Args:
        trace: the pass.
        source: the number of the input, from 0.
    """

    def __init__(self, trace: Trace, source: int = 0) -> None:
        self.trace, self._bit = trace, 1 << source
        self.before: dict[int, int] = {}
        self.depth: dict[int, int] = {INPUT: 0}
        for operation in trace.operations:
            if operation.sources & self._bit:
                self._add(operation, INPUT - source)

    def _add(self, operation: Operation, root: int) -> None:
        makers = [INPUT if number == root else number for number in operation.inputs]
        first, *others = [number for number in makers if number in self.depth]
        for other in others:
            while first != other:  # the nearest that both have
                if self.depth[first] < self.depth[other]:
                    first, other = other, first
                first = self.before[first]
        self.before[operation.number] = first
        self.depth[operation.number] = self.depth[first] + 1

    def chain(self, operation: Operation) -> list[Operation]:
        """All values through which everything flows to an operation, itself the last."""
        found = []
        number = operation.number
        while number != INPUT:
            found.append(self.trace.operations[number])
            number = self.before[number]
        return found[::-1]


def encoders(trace: Trace) -> list[Encoder]:
    """The encoder of every image that the network takes; those that are the same once."""
    found: list[Encoder] = []
    for source in range(len(trace.inputs)):
        encoder = _encoder(trace, source)
        if encoder is not None and all(other.deepest is not encoder.deepest for other in found):
            found.append(encoder)
    return found


def _encoder(trace: Trace, source: int) -> Encoder | None:
    dominators = Dominators(trace, source)
    led = [o for o in trace.operations if o.number in dominators.before and trace.is_feature(o)]
    # What has lost an axis of the image, or come by its shape in an unknown way, is a feature where there is no other.
    most = max((len(o.layout.grid or ()) for o in led if o.layout is not None), default=0)
    features = [o for o in led if o.layout is not None and len(o.layout.grid or ()) == most] or led
    if not features:
        return None
    deepest, stages = _found(dominators, features)
    if path := _module(trace, stages, deepest):
        features = [o for o in features if _belongs(trace, o, path)]
        deepest, stages = _found(dominators, features)
    # A decoder without side exits belongs to it where it holds more than half of the weights.
    last = max((o for o in features if deepest in dominators.chain(o)), key=lambda o: o.number)
    if trace.elements(deepest.weights) < trace.elements(last.weights) / 2:
        deepest, stages = last, _stages(dominators, last)
    return Encoder(trace, stages, _leading_to(trace, deepest))


def _belongs(trace: Trace, value: Operation, path: str) -> bool:
    """Whether a module has made a value, or the value is an activation of what it returns."""
    if value.name in ACTIVATIONS and value.inputs[0] > INPUT and path in trace.operations[value.inputs[0]].outputs_of:
        return True
    return within(value.module, path) or path in value.outputs_of


def _found(dominators: Dominators, features: list[Operation]) -> tuple[Operation, list[list[Operation]]]:
    """The deepest feature and the stages on the way to it, without resolutions at the end that are no stage."""
    while True:
        deepest = _deepest(dominators, features)
        stages = _stages(dominators, deepest)
        finer = [o for o in features if level(o) > level(stages[-1][0]) * SAME_RESOLUTION]
        if len(stages) < 2 or not finer or _is_stage(dominators, stages, deepest):
            return deepest, stages
        features = finer


def _is_stage(dominators: Dominators, stages: list[list[Operation]], deepest: Operation) -> bool:
    """Whether the last of these is a stage of the encoder.

    It is not where a pyramid has further levels, of a single convolution each or in modules behind that of the encoder, nor
    where the last block works at a lower resolution within it.
    """
    trace, depth = dominators.trace, layers(dominators.trace)
    ends = [depth[stage[-1].number] for stage in stages]
    thickness = [after - before for before, after in itertools.pairwise([0, *ends])]
    blocks = [any(closes_block(trace, value) for value in stage) for stage in stages]
    own = trace.elements(deepest.weights & ~stages[-2][-1].weights) / max(1, trace.elements(deepest.weights))
    if thickness[-1] == 0 or 0 < own < (
        0.02 if blocks[-1] or sum(blocks) < 2 else 0.1
    ):  # 0: the weights are those before
        return False
    if thickness[-1] == 1 and max(thickness) > 3 and not blocks[-1]:
        return False
    module = _module(trace, stages[:-1], deepest)
    if not within(stages[-1][0].module, module) and thickness[-1] < 0.15 * ends[-1] and own < 0.5:
        return False
    enlarged = _enlarged(trace)
    return not any(
        trace.is_feature(o) and same_resolution(o, stages[-2][0]) and len(o.grid) == len(deepest.grid)
        for o in _led_to(trace, deepest)
        if o.number not in enlarged
    )


def _deepest(dominators: Dominators, features: list[Operation]) -> Operation:
    """The value with the most resolutions on the way to it, before the maps grow again; then with the most values."""
    usable = {operation.number for operation in features}
    least: dict[int, float] = {INPUT: math.inf}
    count, values = {INPUT: 0}, {INPUT: 0}
    best, best_key = features[0], (0, 0)
    for number, before in dominators.before.items():
        least[number], count[number], values[number] = least[before], count[before], values[before]
        if number not in usable:
            continue
        size = level(dominators.trace.operations[number])
        if size > least[before] * SAME_RESOLUTION:
            least[number] = -1  # grown: so is what follows
            continue
        if size * SAME_RESOLUTION < least[before]:
            least[number], count[number] = size, count[before] + 1
        values[number] += 1
        if least[number] > 0 and (count[number], values[number]) > best_key:
            best, best_key = dominators.trace.operations[number], (count[number], values[number])
    trace = dominators.trace

    def weight(operation: Operation) -> tuple[int, int]:
        return trace.elements(operation.weights), operation.number

    enlarged = _enlarged(trace)
    # Cells that take the values of the last two, branches that are mixed: nothing flows through a single one. What a module
    # for necks makes of maps that it has enlarged is no such branch.
    coarsest = min(features, key=level)
    last = max((o for o in features if same_resolution(o, coarsest)), key=weight)
    mixed = last.number not in enlarged or not _module(trace, _stages(dominators, best), best)
    if 2 * weight(best)[0] < weight(last)[0] and mixed:
        return last
    # It may lie within the last block, or on one of two branches.
    alike = {o.number for o in features if (o.number in enlarged) == (best.number in enlarged)}
    near = _led_to(trace, best, level(best) * SAME_RESOLUTION)
    alike |= {o.number for o in near if count[o.number] == count[best.number]}
    best = max(
        (o for o in features if o.number in alike and least[o.number] > 0 and same_resolution(best, o)), key=weight
    )
    # It may lie on a branch of a block that ends at a lower resolution, or of a head.
    end = max(_led_to(trace, best), key=weight)
    common = usable & {o.number for o in dominators.chain(end)}
    shared = [o for o in dominators.chain(best) if o.number in common and same_resolution(best, o)]
    return shared[-1] if shared and weight(shared[-1])[0] > 0.7 * weight(best)[0] else best


def _led_to(trace: Trace, start: Operation, largest: float = math.inf) -> list[Operation]:
    """The values that a value leads to, itself the first, without features of more than so many positions between."""
    reached, found = {start.number}, [start]
    for operation in trace.operations[start.number + 1 :]:
        if reached.isdisjoint(operation.inputs):
            continue
        if operation.layout is not None and trace.is_feature(operation) and level(operation) > largest:
            continue
        found.append(operation)
        reached.add(operation.number)
    return found


def _enlarged(trace: Trace) -> set[int]:
    """Numbers of the operations to which a value leads that has been made larger, by interpolation or so."""
    found: set[int] = set()
    for operation in trace.operations:
        makers = [trace.operations[number] for number in operation.inputs if number > INPUT]
        before = [level(maker) for maker in makers if trace.is_feature(maker)]
        grows = (
            before
            and operation.name not in _INSIDE
            and trace.is_feature(operation)
            and level(operation) > SAME_RESOLUTION * max(before)
        )
        if grows or not found.isdisjoint(operation.inputs):
            found.add(operation.number)
    return found


def _stages(dominators: Dominators, deepest: Operation) -> list[list[Operation]]:
    """The values on the way to the deepest, by resolution."""
    stages: list[list[Operation]] = []
    for operation in dominators.chain(deepest):
        if dominators.trace.is_feature(operation):
            if not stages or not same_resolution(stages[-1][0], operation):
                stages.append([])
            stages[-1].append(operation)
    return stages


def within(module: str, path: str) -> bool:
    """Whether a module is that of a path, or in it."""
    return not path or module == path or module.startswith(f"{path}.")


def _module(trace: Trace, stages: list[list[Operation]], deepest: Operation) -> str:
    """Path of the module that is the encoder, "" where there is none: what follows it are necks and heads.

    All changes of resolution lie in it, and half of the layers or of the weights on the way to the deepest feature. Where
    there is one resolution, its first value lies in it, but not that alone, and most of the layers.
    """
    # What has no weights before it prepares the image.
    starts = [stage[0].module.split(".") for stage in stages if stage[0].weights]
    if len(starts) == 1:
        starts[0].pop()
    path: list[str] = []
    for names in zip(*starts, strict=False):
        if len(set(names)) > 1:
            break
        path.append(names[0])
    layer_modules = [
        trace.operations[o].module for o in _leading_to(trace, deepest) if trace.operations[o].name in _LAYERS
    ]
    while path:
        module = ".".join(path)
        inside = sum(
            1 << bit for bit, name in enumerate(trace.weights) if deepest.weights >> bit & 1 and within(name, module)
        )
        own_layers = sum(within(name, module) for name in layer_modules)
        if 2 * own_layers > len(layer_modules):
            break
        # Where there is one resolution, few layers with many weights are the stem of a transformer.
        half = 2 * own_layers == len(layer_modules) or 2 * trace.elements(inside) >= trace.elements(deepest.weights)
        if len(starts) > 1 and half:
            break
        path.pop()
    return ".".join(path)


def layers(trace: Trace) -> list[int]:
    """How many layers lie before and at each operation, on the longest way to it."""
    depth: list[int] = []
    for operation in trace.operations:
        before = max((depth[number] for number in operation.inputs if number > INPUT), default=0)
        depth.append(before + (operation.name in _LAYERS))
    return depth


def closes_block(trace: Trace, value: Operation) -> bool:
    """Whether the value is a sum or concatenation, perhaps rearranged; gates and attention are inside blocks."""
    root = arranged(trace, value)
    return len(root.inputs) > 1 and root.name not in _INSIDE


def arranged(trace: Trace, value: Operation) -> Operation:
    """The value that this one is a rearrangement of; itself where it is none."""
    while value.name in _REARRANGING and len(value.inputs) == 1 and value.inputs[0] > INPUT:
        value = trace.operations[value.inputs[0]]
    return value


def _leading_to(trace: Trace, operation: Operation) -> set[int]:
    found, left = {operation.number}, [operation.number]
    while left:
        for number in trace.operations[left.pop()].inputs:
            if number > INPUT and number not in found:
                found.add(number)
                left.append(number)
    return found


def leading(encoder: Encoder) -> Iterator[Operation]:
    """The maps and tokens that lead to the deepest feature, in their order."""
    for number in sorted(encoder.inside):
        if encoder.trace.is_feature(operation := encoder.trace.operations[number]):
            yield operation

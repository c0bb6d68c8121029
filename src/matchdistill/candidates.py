"""The candidates for positions: values at which each stage of an encoder can be tapped.

Axes: N batch, C channels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from matchdistill.encoder import (
    ACTIVATIONS,
    Encoder,
    arranged,
    closes_block,
    layers,
    leading,
    level,
    same_resolution,
    within,
)
from matchdistill.taps import ADDING, Tap
from matchdistill.trace import Operation, Trace

_COMPUTING = frozenset("conv1d conv2d conv3d linear batch_norm layer_norm group_norm".split())
_TOKEN_NORMS = frozenset("layer_norm rms_norm".split())
# A stage's position has at least this share of the stage's weights behind it, if any value has.
_ENOUGH = 0.6
# Of the encoder's weights, what a resolution that lies on branches alone has at least; what a block does within it is less.
_BRANCH = 0.0005


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
    """The encoder's stages, and stages of other resolutions in its branches, finest first."""
    stages = list(encoder.stages)
    for operation in leading(encoder):
        if closes_block(encoder.trace, operation) and not any(same_resolution(s[0], operation) for s in stages):
            stages.append([operation])
    return sorted(stages, key=lambda stage: -level(stage[0]))


def _of_stage(encoder: Encoder, stage: list[Operation]) -> list[Candidate]:
    trace = encoder.trace
    ends: dict[int, Candidate] = {}
    # Where blocks end in sums, a norm behind one prepares the tokens, begins the next block or belongs to the classifier.
    without_sums = not any(value.outputs_of and closes_block(trace, value) for value in stage)
    for value in stage:
        found = None
        if value.name in ACTIVATIONS:
            found = _before_activation(trace, value)
        elif value.outputs_of and (closes_block(trace, value) or (without_sums and _normed(trace, value) is not None)):
            tap = Tap(_name(value), "output", value.channel_dim, "end of the last block at its resolution")
            found = Candidate(tap, value)
        if found is not None and trace.is_feature(found.operation):
            end = (without_sums and _normed(trace, found.operation)) or found.operation
            root = arranged(trace, end).number
            if root not in ends or not ends[root].in_order:
                ends[root] = replace(found, closes_block=closes_block(trace, end))
    if ends:
        closing = [ends[number] for number in sorted(ends)]
        return [*closing, *_stage_output(encoder, stage, closing)]
    reason = "last value at its resolution"
    return [
        Candidate(Tap(_name(value), "output", value.channel_dim, reason), value)
        for value in stage
        if value.outputs_of and value.name in _COMPUTING
    ]


def _normed(trace: Trace, value: Operation) -> Operation | None:
    """The sum whose norm a value is, where blocks end in norms (BERT, wav2vec 2.0); None for others."""
    maker = trace.made_by(value.inputs[0]) if value.name in _TOKEN_NORMS else None
    return maker if maker is not None and closes_block(trace, maker) else None


def _stage_output(encoder: Encoder, stage: list[Operation], ends: list[Candidate]) -> list[Candidate]:
    """What the module of the stage, or of its last block, returns if a layer follows the end that was found."""
    # A module of several stages is the network, and so is one of several blocks where there is a single stage.
    others = [other[0].module for other in encoder.stages if other is not stage] or [
        one.operation.module for one in ends[:-1]
    ]
    end = ends[-1]
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
    led = leading(encoder) if stage[0].number in encoder.through else filter(trace.is_feature, trace.operations)
    values = [value for value in led if same_resolution(stage[0], value)]
    own = 0
    for value in values:
        own |= value.weights & ~before
    covered = found[-1].operation.weights if found else 0
    whole = trace.elements(own)
    if trace.elements(own & covered) >= _ENOUGH * whole or (
        not found and whole < _BRANCH * trace.elements(encoder.deepest.weights)
    ):
        return found
    best = covered
    for value in values:
        more = closes_block(trace, value) and trace.elements(own & value.weights) > trace.elements(own & best)
        if more and (candidate := _at(trace, value)) is not None:
            best, found = value.weights, [*found, replace(candidate, closes_block=True)]
    return found


def _at(trace: Trace, value: Operation) -> Candidate | None:
    """The tap of a value, before the activation that follows where there is one."""
    reason = "end of the block to which most of the weights at its resolution lead"
    for path in value.inputs_of:
        following = next((o for o in trace.operations if value.number in o.inputs and o.module == path), None)
        shared = value.outputs_of and following is not None and _is_shared(trace, following)
        if following is not None and following.name in ACTIVATIONS and not shared:
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
    last = stages[-1]
    if sum(one.closes_block for stage in stages[:-1] for one in stage) > 0:
        last = [one for one in last if len(one.operation.shape or ()) == 3]
        before = [one for stage in stages for one in stage if one not in last]
        if any(len(one.operation.shape or ()) == 3 for one in before):  # tokens of several resolutions
            return stages
    blocks = sum(one.closes_block for one in last)
    if blocks < 4 or blocks < 0.4 * sum(one.closes_block for stage in stages for one in stage):
        return stages
    stem = max(
        (one.operation.weights for stage in stages for one in stage if one not in last),
        key=encoder.trace.elements,
    )
    whole = encoder.trace.elements(last[-1].operation.weights)
    return stages if encoder.trace.elements(stem) > whole / 2 else [last]


def _before_activation(trace: Trace, activation: Operation) -> Candidate | None:
    """The tap of an activation's input; of its output where no module is called with, or returns, its input or addends."""
    value = trace.made_by(activation.inputs[0])
    reason = "before the last activation at its resolution"
    if value is not None and value.shape is not None:
        if activation.module in value.inputs_of and not (value.outputs_of and _is_shared(trace, activation)):
            return Candidate(Tap(activation.module, "input", value.channel_dim, reason), value)
        if value.outputs_of:
            return Candidate(Tap(_name(value), "output", value.channel_dim, reason), value)
        if (total := _sum_tap(trace, value, reason)) is not None:
            return Candidate(total, value)
    if activation.outputs_of:
        reason = "after the last activation at its resolution: no module returns the value before it"
        return Candidate(Tap(_name(activation), "output", activation.channel_dim, reason), activation)
    return None


def _is_shared(trace: Trace, activation: Operation) -> bool:
    """Whether the activation's module runs more than once: other blocks, even other networks, may have the same module."""
    runs = [o for o in trace.operations if (o.module, o.name) == (activation.module, activation.name)]
    return len(runs) > 1


def _sum_tap(trace: Trace, value: Operation, reason: str) -> Tap | None:
    """The tap of a sum of two values that modules are called with or return; None for anything else."""
    makers = [trace.made_by(number) for number in value.inputs]
    if value.name not in ADDING or len(makers) != 2:
        return None
    taps = []
    for maker in makers:
        if maker is None or maker.shape != value.shape or not (maker.outputs_of or maker.inputs_of):
            return None
        # The last module that passes it on: a dropout makes another value in training mode.
        passing = [path for path in maker.outputs_of if not within(maker.module, path)]
        names = passing[-1:] or ([_name(maker)] if maker.outputs_of else [])
        taps.append(Tap(names[0]) if names else Tap(maker.inputs_of[0], "input"))
    return replace(taps[0], channel_dim=value.channel_dim, reason=reason, plus=taps[1])

"""The automatic choice of taps: the candidates of two networks in pairs, from one pass of each.

Axes: N batch, C channels, T tokens, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.candidates import Candidate, candidates
from matchdistill.encoder import encoders, level
from matchdistill.messages import cause, listed
from matchdistill.taps import Tap, unwrapped
from matchdistill.trace import Trace, tensors_in, traced


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
    ends = [stage[-1] for stage in student]
    if len(teacher) == 1:
        ends = ends[-min(limit, len(teacher[0])) :]
        return list(zip(_alike(teacher[0], ends), ends, strict=True))
    pairs: list[tuple[Candidate, Candidate]] = []
    deep: list[Candidate] = []
    for end in ends:
        nearest = min(teacher, key=lambda stage: _distance(stage[-1], end))
        if nearest is teacher[-1] and (deep or _same_size(nearest[-1], end) or pairs):
            deep.append(end)
        elif _same_size(nearest[-1], end):
            pairs.append((nearest[-1], end))
    deep = deep[-len(teacher[-1]) :]
    return [*pairs, *zip(_alike(teacher[-1], deep), deep, strict=True)][-limit:]


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
    """The pairs of candidates of two traces; where the networks take several images, of the encoder of each.

    Raises:
        ValueError: there is none.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 position")
    teacher_stages, student_stages = (
        [found for encoder in encoders(trace) if (found := candidates(encoder))] for trace in (teacher, student)
    )
    for role, trace, stages in (("teacher", teacher, teacher_stages), ("student", student, student_stages)):
        if not stages:
            outputs = {path: o.shape for o in trace.operations for path in o.outputs_of if path and o.shape}
            raise ValueError(
                f"found no position in the {role}: no feature map through which everything flows to its end. Give taps= of "
                f"your own, for example outputs of {listed(f'{path} {shape}' for path, shape in outputs.items())}. For a "
                "network that is part of a larger model, give the part, an example= of its input, and forward= to refresh()"
            )
    both = zip(teacher_stages, student_stages, strict=False)
    pairs = [pair for of_teacher, of_student in both for pair in pair_candidates(of_teacher, of_student, limit)]
    if not pairs:
        lists = (
            listed(f"{stage[-1].tap} {stage[-1].operation.grid}" for stage in found[0])
            for found in (teacher_stages, student_stages)
        )
        raise ValueError(
            f"no two positions have about the same resolution. Teacher: {next(lists)}. Student: {next(lists)}. Give taps=, "
            "or an example= of the size that you train with"
        )
    return pairs


def trace_pair(teacher: nn.Module, student: nn.Module, example: Tensor | tuple[Any, ...] | None) -> tuple[Trace, Trace]:
    """Trace both networks on one example; without one, on inputs of the first size that both accept.

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
    error = None
    # Passes without values take no time and no memory at any size; few networks need those.
    for values in (False, True):
        for shape in _likely_inputs(models):
            inputs = torch.zeros(shape)
            try:
                return _traced(models[0], (inputs,), "teacher", values), _traced(
                    models[1], (inputs,), "student", values
                )
            except ValueError as failure:
                error = failure if error is None or values else error
    raise ValueError(f"{error}. Give example=, an input that both networks take")


def _traced(model: nn.Module, arguments: tuple[Any, ...], role: str, values: bool = True) -> Trace:
    """A trace on the arguments as this model needs them: its device and floating point type."""
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    try:
        return traced(model, placed(arguments, weight), values=values)
    except Exception as failure:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors_in(arguments))
        raise ValueError(
            f"the {role} ({type(model).__name__}) fails on an input of shape {shapes}: {cause(failure)}"
        ) from failure


def placed(example: Tensor | tuple[Any, ...], like: Tensor) -> tuple[Any, ...]:
    """An example as arguments on a weight's device and, where they are floating, in its type."""

    def place(value: Tensor) -> Tensor:
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    arguments: tuple[Any, ...] = tree_map_only(Tensor, place, example if isinstance(example, tuple) else (example,))
    return arguments


def _likely_inputs(models: Iterable[nn.Module]) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs to try: of the sizes that the models name, then common ones, of images, videos or sequences."""
    *_, student = models = list(models)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((module for module in student.modules() if isinstance(module, kinds)), None)
    channels = first.in_channels if first is not None else 3
    if isinstance(first, nn.Conv1d):
        yield from ((2, channels, length) for length in (1024, 16_000, 4096, 256, 128, 64))
    elif isinstance(first, nn.Conv3d):
        shapes = ((16, 224, 224), (16, 112, 112), (8, 64, 64), (64, 64, 64), (96, 96, 96), (32, 32, 32))
        yield from ((2, channels, *shape) for shape in shapes)
        yield from ((2, shape[0], channels, *shape[1:]) for shape in shapes[:3])
    else:
        named = [size for model in models for size in _named_sizes(model)]
        for size in dict.fromkeys([*named, 224, 299, 384, 128, 96, 64, 48, 32, 28, 16, 8]):
            yield 2, channels, size, size


def _named_sizes(model: nn.Module) -> Iterator[int]:
    """The sizes of images that a model names: torchvision's ViT, configurations of timm and transformers."""
    configurations = (getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg"))
    sizes = [getattr(model, "image_size", None), getattr(getattr(model, "config", None), "image_size", None)]
    for size in [*sizes, *((found or {}).get("input_size") for found in configurations)]:
        size = size[-1] if isinstance(size, (tuple, list)) and size else size
        if isinstance(size, int):
            yield size

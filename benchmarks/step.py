"""What a step of training costs beside the least that it could cost.

Axes: N batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness import interleaved, summary
from benchmarks.original import Original
from benchmarks.pairs import Choice, Pair, by_pair, random_batch, training_step
from matchdistill.baselines import FitNetsPosition
from matchdistill.engine import on_onnxruntime
from matchdistill.functional import kd_loss
from matchdistill.prepare import Prepare, prepared

Step = Callable[[], None]
ENGINE = "onnxruntime"
Maker = Callable[[Pair, Tensor, Tensor], Step]


def alone(pair: Pair, images: Tensor, labels: Tensor) -> Step:
    """The student's own step."""
    student = pair.networks(images)[1]
    return training_step(lambda images: (student(images), 0.0), student.parameters(), images, labels)


def limit(pair: Pair, images: Tensor, labels: Tensor, compiled: bool = False) -> Step:
    """The student's step and a forward pass of the teacher, which nothing is done with."""
    teacher, student = pair.networks(images)
    parameters = list(student.parameters())
    teacher.eval()
    if compiled:
        teacher, student = torch.compile(teacher), torch.compile(student)

    def forward(images: Tensor) -> tuple[Tensor, float]:
        with torch.inference_mode():
            teacher(images)
        return student(images), 0.0

    return training_step(forward, parameters, images, labels)


def kd(pair: Pair, images: Tensor, labels: Tensor) -> Step:
    """Hinton's distillation of the output."""
    teacher, student = pair.networks(images)
    teacher.eval()

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = teacher(images)
        output = student(images)
        return output, kd_loss(output, goal)

    return training_step(forward, student.parameters(), images, labels)


def matchdistill(pair: Pair, images: Tensor, labels: Tensor, compiled: bool = False, **options: Any) -> Step:
    """A `MatchingDistiller`, matched on the same batch."""
    distiller = pair.distiller(images, **options)
    distiller.refresh([images])
    forward = torch.compile(distiller) if compiled else distiller
    return training_step(forward, distiller.parameters(), images, labels)


def original(pair: Pair, images: Tensor, labels: Tensor) -> Step:
    """As the original does it."""
    made = Original(pair, images)
    matched = pair.distiller(images)
    made.match([matching.index for matching in matched.refresh([images])])
    return training_step(made, made.parameters(), images, labels)


def fitnets(pair: Pair, images: Tensor, labels: Tensor) -> Step:
    """FitNets at the same positions."""
    distiller = pair.feature_distiller(images, FitNetsPosition)
    return training_step(distiller, distiller.parameters(), images, labels)


def loss_compiled(pair: Pair, images: Tensor, labels: Tensor, **how: Any) -> Step:
    """A compiled loss, and a prepared teacher."""
    distiller = pair.distiller(images, prepare=functools.partial(prepared, **how))
    distiller.refresh([images])
    for position in distiller.positions:
        position.compile(dynamic=True)
    return training_step(distiller, distiller.parameters(), images, labels)


# What makes the teacher faster.
PREPARED: dict[str, Prepare] = {
    "prepared": prepared,
    "prepared + bf16": functools.partial(prepared, dtype=torch.bfloat16),
    "prepared + compile": functools.partial(prepared, compile=True),
    "prepared + bf16 + compile": functools.partial(prepared, compile=True, dtype=torch.bfloat16),
    ENGINE: on_onnxruntime,
}
COMPILED: dict[str, Maker] = {
    "limit compiled": functools.partial(limit, compiled=True),
    "compiled": functools.partial(matchdistill, compiled=True),
}
MAKERS: dict[str, Maker] = {
    "limit": limit,
    "matchdistill": matchdistill,
    **{name: functools.partial(matchdistill, prepare=prepare) for name, prepare in PREPARED.items()},
    "prepared + compiled loss": loss_compiled,
    "prepared + bf16 + compiled loss": functools.partial(loss_compiled, dtype=torch.bfloat16),
    **COMPILED,
    "original": original,
    "fitnets": fitnets,
    "kd": kd,
    "alone": alone,
}


def selection(device: str, compile: bool, only: list[str] | None) -> list[str]:
    """The works to time: those asked for, or all that suit the device, without the whole compiled steps by default."""
    if only is not None:
        if unknown := set(only) - MAKERS.keys():
            raise ValueError(f"only: no work {', '.join(sorted(unknown))}: expected some of {', '.join(MAKERS)}")
        return ["limit", *(name for name in MAKERS if name in only and name != "limit")]
    names = [name for name in MAKERS if compile or name not in COMPILED]
    return [name for name in names if name != (ENGINE if device == "cuda" else "prepared + bf16 + compile")]


def loss_differences(pair: Pair, images: Tensor, prepares: Mapping[str, Prepare]) -> dict[str, float]:
    """How far, relatively, the loss with each prepared teacher is from that without; weights and matching are the same."""
    reference = pair.distiller(images)
    reference.refresh([images])
    state = copy.deepcopy(reference.state_dict())
    expected = reference(images)[1].item()
    differences = {}
    for name, prepare in prepares.items():
        distiller = pair.distiller(images, prepare=prepare)
        distiller.load_state_dict(state)
        differences[name] = abs(distiller(images)[1].item() - expected) / abs(expected)
    return differences


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    rounds: int = 20,
    compile: bool = False,
    only: list[str] | None = None,
) -> None:
    """Time steps of training, the works in turn, and compare each with the limit.

    The limit is the student's step and a forward pass of the teacher in inference mode. The result has for each work the
    median of its seconds and of its ratios to the limit by round, and for the prepared teachers the relative difference of
    the loss.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
        compile: also the whole step by torch.compile, and the limit so, which takes minutes to compile.
        only: the works to time beside the limit; default: all.
    """
    names = selection(device, compile, only)
    images, labels = random_batch(size, batch, device)

    def measured(name: str, each: Pair) -> dict[str, Any]:
        works = {work: MAKERS[work](each, images, labels) for work in names}
        found = summary(interleaved(works, rounds, device), "limit")
        for work, own in found.items():
            print(f"{name}, {work}: {own['seconds']:.4f} s, {own['ratio']['median']:.3f} of the limit", flush=True)
        prepares = {work: PREPARED[work] for work in names if work in PREPARED}
        return {"works": found, "loss differences": loss_differences(each, images, prepares)}

    by_pair("step", device, json, pair, {"size": size, "batch": batch}, measured)


def run_online(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    rounds: int = 10,
    every: int = 10,
) -> None:
    """Time steps whose features are also summed for the next matching, so that a refresh needs no images.

    Every work is that many steps, of which one sums; ratios are to the steps without.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
        every: steps from one that sums to the next.
    """
    images, labels = random_batch(size, batch, device)

    def measured(name: str, each: Pair) -> dict[str, Any]:
        works = {
            "limit": limit(each, images, labels),
            "matchdistill": matchdistill(each, images, labels),
            "online": matchdistill(each, images, labels, online=every),
        }
        repeated = {work: functools.partial(_repeat, step, every) for work, step in works.items()}
        found = summary(interleaved(repeated, rounds, device, warmup=1), "matchdistill")
        print(f"{name}: online {found['online']['ratio']['median']:.4f} of the steps without", flush=True)
        return {"works": found}

    by_pair("online", device, json, pair, {"size": size, "batch": batch, "every": every}, measured)


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()

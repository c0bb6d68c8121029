"""What a step of training costs whose teacher's features are read from disk, beside the student alone.

Axes: N batch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import Stopwatch, interleaved, summary
from benchmarks.pairs import Choice, Pair, by_pair, random_batch, training_step
from benchmarks.step import alone, limit, matchdistill
from matchdistill.cache import TeacherCache
from matchdistill.capture import Captured
from matchdistill.slots import GIB, Slots, checksum


def cached(
    pair: Pair, images: Tensor, labels: Tensor, folder: Path, dtype: torch.dtype, batches: int
) -> tuple[Callable[[], None], TeacherCache]:
    """A step of a `MatchingDistiller` that reads the teacher's features, of other views each time.

    Args:
        pair: of networks.
        images: of all steps (N, 3, H, W).
        labels: (N,).
        folder: of the cache.
        dtype: that the features are kept in.
        batches: how many batches of features are kept, of which each step reads the next one: the same images by other
            numbers.

    Returns:
        The step, and the cache, which is full.
    """
    distiller = pair.distiller(images)
    distiller.refresh([images])
    frozen = distiller.frozen_teacher
    found = frozen(Captured(arguments=((images,), {})))
    shapes = tuple(tuple(found[number].shape[1:]) for number in range(len(found)))
    cache = TeacherCache(folder, Slots(shapes, dtype, batches * len(images)), frozen.model, {}, 1000 * GIB)
    cache.open()
    frozen.cache = cache
    pixels = torch.tensor([checksum(image) for image in images.cpu()])
    step = training_step(distiller, distiller.parameters(), images, labels)
    turn = 0

    def next_step() -> None:
        nonlocal turn
        first = turn % batches * len(images)
        turn += 1
        with cache.of(torch.stack([torch.arange(first, first + len(images)), pixels], 1)):
            step()

    for _ in range(batches):
        next_step()
    return next_step, cache


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    rounds: int = 20,
    batches: int = 8,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> None:
    """Time steps of training with a cache of the teacher's features, and compare each work with the student alone.

    The features are read from the system's copy of the files in memory, and every checksum is tested. On a CPU, seconds are
    the process's own.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
        batches: how many batches of features are kept.
        dtype: that the features are kept in.
    """
    images, labels = random_batch(size, batch, device)

    def measured(name: str, each: Pair) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            step, cache = cached(each, images, labels, Path(folder), getattr(torch, dtype), batches)
            runs = cache.runs
            works = {
                "alone": alone(each, images, labels),
                "cached": step,
                "matchdistill": matchdistill(each, images, labels),
                "limit": limit(each, images, labels),
            }
            # On a CPU its own seconds count, as other programs may take turns with it.
            clock = time.process_time if device == "cpu" else time.perf_counter
            found = summary(interleaved(works, rounds, device, clock=clock), "alone")
            with mock.patch.object(cache, "values", Stopwatch(cache.values)) as reading:
                for _ in range(batches):
                    step()
            if cache.runs != runs:
                raise RuntimeError("the teacher ran in steps that were to read its features")
            cache.close()
        for work, own in found.items():
            print(
                f"{name}, {work}: {own['seconds']:.4f} s, {own['ratio']['median']:.3f} of the student alone", flush=True
            )
        return {
            "works": found,
            "bytes of an image": cache.layout.slot,
            "reading": statistics.median(reading.seconds),
        }

    given = {"size": size, "batch": batch, "batches": batches, "dtype": dtype}
    by_pair("cached", device, json, pair, given, measured)

"""The most memory that a step and a refresh hold, each measured in a process of its own.

On a GPU it is what PyTorch's allocator counts. On a CPU, the profiler's record of every allocation and release of PyTorch's
allocator, added up in order: the bytes of all tensors that live at a time, weights and the optimiser's state with them, the
same in every run. What libraries take beside it (oneDNN's scratch) and the interpreter are in the largest resident size
alone, which is measured in another process, without the profiler.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import refresh, step
from benchmarks.harness import in_processes
from benchmarks.pairs import Choice, Pair, by_pair, random_batch
from matchdistill.measuring import peak_memory, watch_memory

STEPS = ("limit", "matchdistill", "prepared", "original", "fitnets")
MEASURED = "measured"
Build = Callable[[], Callable[[], object]]


def tensor_peak(build: Build) -> int:
    """The most bytes in CPU tensors while what `build` makes runs for the second time; the first allocates what stays."""
    gc.collect()  # what earlier work has left would be freed, and counted, while this one runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work = build()
        work()
        with record_function(MEASURED):
            work()
    events = profiled.profiler.kineto_results.events()
    (start, end), *_ = [(event.start_ns(), event.end_ns()) for event in events if event.name() == MEASURED]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for when, change in changes:
        held += change
        if when <= start:
            peak = held  # what is held as it begins
        elif when <= end:
            peak = max(peak, held)
    return peak


def held_peak(build: Build, device: str) -> int | None:
    """The same as the device tells: of tensors on a GPU, else of the whole process, libraries and interpreter with it."""
    work = build()
    work()
    watch_memory(torch.device(device))
    work()
    return peak_memory(torch.device(device))


PEAKS: dict[str, Callable[[Build], int | None]] = {
    "cpu": tensor_peak,
    "cuda": functools.partial(held_peak, device="cuda"),
    "resident": functools.partial(held_peak, device="cpu"),
}


def measure(kind: str, pair: Pair, name: str, device: str, size: int, batch: int, batches: int) -> int | None:
    """The peak of a step, or of a refresh over that many batches."""
    images, labels = random_batch(size, batch, device)
    if not batches:
        return PEAKS[kind](lambda: step.MAKERS[name](pair, images, labels))

    def build() -> Callable[[], object]:
        over = refresh.MAKERS[name](pair, images)
        return lambda: over([images] * batches)

    return PEAKS[kind](build)


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    batches: tuple[int, int] = (2, 8),
    only: list[str] | None = None,
) -> None:
    """Measure the most memory that a step, and refreshes of two lengths, hold.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        batches: batches of the two refreshes.
        only: the works to measure beside the limit; default: all.
    """
    kinds = {"tensors": device} | ({"resident": "resident"} if device == "cpu" else {})

    def measured(label: str, each: Pair) -> dict[str, Any]:
        found = {
            (name, count): {
                key: in_processes(measure, [(kind, each, name, device, size, batch, count)])[0]
                for key, kind in kinds.items()
            }
            for name, count in [(name, 0) for name in STEPS] + [(name, n) for name in refresh.MAKERS for n in batches]
            if only is None or name in ("limit", "forwards", *only)
        }
        steps = {name: peaks for (name, count), peaks in found.items() if not count}
        for name, peaks in steps.items():
            print(f"{label}, {name}: {peaks['tensors'] / 2**20:.0f} MiB", flush=True)
        refreshes = [
            {"work": name, "images": count * batch, **peaks} for (name, count), peaks in found.items() if count
        ]
        return {"step": steps, "refresh": refreshes}

    by_pair("memory", device, json, pair, {"size": size, "batch": batch}, measured)

"""The most memory that a step and a refresh hold, each measured in a process of its own.

On a GPU it is what PyTorch's allocator counts. On a CPU, the profiler's record of every allocation and release of PyTorch's
allocator, added up in order: the bytes of all tensors that live at a time, weights and the optimiser's state with them, the
same in every run. What libraries take beside it (oneDNN's scratch) and the interpreter are in the largest resident size
alone, which is measured in another process, without the profiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import refresh, step
from benchmarks.harness import in_processes, save
from benchmarks.pairs import Choice, Pair, chosen, random_batch

STEPS = ("limit", "matchdistill", "prepared", "original", "fitnets")
MEASURED = "measured"
Build = Callable[[], Callable[[], object]]


def tensor_peak(build: Build) -> int:
    """The most bytes in CPU tensors while what `build` makes runs for the second time; the first allocates what stays."""
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


def cuda_peak(build: Build) -> int:
    """The same of tensors on the GPU."""
    work = build()
    work()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def resident_peak(build: Build) -> int | None:
    """The same of the whole process, libraries and interpreter with it; None where the system is no Linux, which tells."""
    work = build()
    work()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # sets the peak to what is resident now
    work()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])


PEAKS: dict[str, Callable[[Build], int | None]] = {"cpu": tensor_peak, "cuda": cuda_peak, "resident": resident_peak}


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
    results: dict[str, Any] = {"size": size, "batch": batch, "pairs": {}}
    for label, each in chosen(pair).items():
        found = {
            (name, count): {
                key: in_processes(measure, [(kind, each, name, device, size, batch, count)])[0]
                for key, kind in kinds.items()
            }
            for name, count in [(name, 0) for name in STEPS] + [(name, n) for name in refresh.MAKERS for n in batches]
            if only is None or name in ("limit", "forwards", *only)
        }
        results["pairs"][label] = {
            "step": {name: peaks for (name, count), peaks in found.items() if not count},
            "refresh": [
                {"work": name, "images": count * batch, **peaks} for (name, count), peaks in found.items() if count
            ],
        }
        for name, peaks in results["pairs"][label]["step"].items():
            print(f"{label}, {name}: {peaks['tensors'] / 2**20:.0f} MiB", flush=True)
        save(json, "memory", device, results)

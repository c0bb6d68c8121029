"""Where the time goes: PyTorch's operators in a step and in a refresh, beside those of what they are compared with.

Axes: N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import refresh, step
from benchmarks.pairs import Choice, Pair, by_pair, random_batch
from matchdistill.functional import solve_assignment

Work = Callable[[], object]
ASSIGNMENT = "solve_assignment"


def seconds_by_operator(work: Work, device: str, kernels: bool = False) -> dict[str, float]:
    """Seconds that each operator takes itself, without those that it calls, in one run of a work.

    On a GPU they are of the kernels that it starts, or, with ``kernels``, of each kernel by its own name.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # A kernel's time stands in a row of its own and in that of the operator: one of them counts.
    wanted = DeviceType.CUDA if device == "cuda" and kernels else DeviceType.CPU
    rows = [
        row for row in profiled.key_averages() if row.device_type == wanted and not (kernels and row.is_user_annotation)
    ]
    return {row.key: getattr(row, time) / 1e6 for row in rows if getattr(row, time) > 0}


def profiles(works: Mapping[str, Work], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each work's seconds by operator; the works take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for work in works.values():
        work()
        work()
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds_by_operator(work, device))
    operators = {operator for runs in found.values() for own in runs for operator in own}
    return {
        name: {operator: float(np.median([own.get(operator, 0.0) for own in runs])) for operator in sorted(operators)}
        for name, runs in found.items()
    }


def recorded(cost: Tensor, group: int) -> Tensor:
    """The assignment, which is none of PyTorch's operators, as one of the profile."""
    with record_function(ASSIGNMENT):
        return solve_assignment(cost, group)


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    batches: int = 16,
    rounds: int = 7,
) -> None:
    """Profile steps beside the limit's, and a refresh beside the two networks' forward passes.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        batches: batches of the refresh.
        rounds: how often each is profiled.
    """
    images, labels = random_batch(size, batch, device)

    def measured(name: str, each: Pair) -> dict[str, Any]:
        steps = {work: step.MAKERS[work](each, images, labels) for work in ("limit", "matchdistill")}
        whole = {
            "forwards": refresh.forwards(each, images),
            "matchdistill": refresh.matchdistill(each, images, matcher=recorded),
        }
        over = {work: lambda run=run: run([images] * batches) for work, run in whole.items()}
        found = {"step": profiles(steps, rounds, device), "refresh": profiles(over, max(2, rounds // 3), device)}
        print(f"{name}: profiled", flush=True)
        return found

    by_pair("profile", device, json, pair, {"size": size, "batch": batch, "batches": batches}, measured)

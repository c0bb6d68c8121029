"""What a refresh costs beside running both networks once over its images.

Axes: N batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Stopwatch, in_processes, interleaved, ratio, summary, timed
from benchmarks.original import HAS_SOLVER, Original, assignment
from benchmarks.pairs import Choice, Pair, by_pair, random_batch
from matchdistill.functional import solve_assignment

Refresh = Callable[[Sequence[Tensor]], Any]


def forwards(pair: Pair, images: Tensor) -> Refresh:
    """Both networks over all batches, and nothing done with what they give."""
    networks = [network.eval() for network in pair.networks(images)]

    @torch.inference_mode()
    def over(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            for network in networks:
                network(batch)

    return over


def matchdistill(pair: Pair, images: Tensor, **options: Any) -> Refresh:
    """The refresh of a `MatchingDistiller`."""
    return pair.distiller(images, **options).refresh


def original(pair: Pair, images: Tensor) -> Refresh:
    """The original's costs; its assignment, whose time does not depend on the images, is not in it."""
    return Original(pair, images).costs


MAKERS: dict[str, Callable[[Pair, Tensor], Refresh]] = {
    "forwards": forwards,
    "matchdistill": matchdistill,
    "original": original,
}


def measure(
    pair: Pair, batches: Sequence[Tensor], original_batches: int, rounds: int, solver: bool, device: str
) -> dict[str, Any]:
    """Seconds of the refreshes, with and without the assignments, and per image; without the original for 0 batches."""
    watch = Stopwatch(solve_assignment, device)
    whole = {
        "forwards": forwards(pair, batches[0]),
        "matchdistill": matchdistill(pair, batches[0], matcher=watch),
    }
    works = {name: lambda work=work: work(batches) for name, work in whole.items()}
    part = batches[:original_batches]
    if part:
        whole["original"] = original(pair, batches[0])
        works["original"] = lambda: whole["original"](part)
    seconds = interleaved(works, rounds, device, warmup=1)
    # The stopwatch has a call for each position, and has run in the warm-up too.
    solving = np.array(watch.seconds).reshape(-1, len(pair.taps)).sum(1)[-rounds:]
    seconds["matchdistill without assignments"] = list(np.array(seconds["matchdistill"]) - solving)
    counts = {name: sum(map(len, part if name == "original" else batches)) for name in seconds}
    found = summary({name: [value / counts[name] for value in own] for name, own in seconds.items()}, "forwards")
    result = {
        "images": counts,
        "per image": found,
        "assignments": float(np.median(solving)),
        "original assignments": None,
    }
    if solver and part:
        costs = whole["original"](part)
        result["original assignments"] = sum(timed(lambda cost=cost: assignment(cost)) for cost in costs)
    return result


def process(rank: int, world: int, folder: str, pair: Pair, size: int, batch: int, images: int) -> tuple[float, list]:
    """One of `world` processes, each with one thread: seconds of a refresh that all begin together, and the matching."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    try:
        batches = random_batch(size, images)[0].split(batch)
        distiller = pair.distiller(batches[0])
        distiller.refresh(batches[:world])  # the first call allocates
        dist.barrier()
        seconds = timed(lambda: distiller.refresh(batches))
        return seconds, [position.index.tolist() for position in distiller.positions]
    finally:
        dist.destroy_process_group()


def measure_processes(pair: Pair, processes: int, rounds: int, size: int, batch: int, images: int) -> dict[str, Any]:
    """Seconds of one process and of several that share the images, in turn; the slowest of them counts."""
    seconds: dict[int, list[float]] = {1: [], processes: []}
    matchings = []
    for _ in range(rounds):
        for world, own in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                arguments = [(rank, world, folder, pair, size, batch, images) for rank in range(world)]
                found = in_processes(process, arguments)
            own.append(max(value for value, _ in found))
            matchings += [matching for _, matching in found]
    return {
        "processes": processes,
        "seconds": {str(world): own for world, own in seconds.items()},
        "ratio": ratio(seconds[processes], seconds[1]),
        "same matching": all(matching == matchings[0] for matching in matchings),
    }


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    images: int = 512,
    original_images: int = 64,
    rounds: int = 5,
    processes: int = 0,
    process_rounds: int = 3,
) -> None:
    """Time refreshes of the matching, in turn with the two networks' forward passes, and compare them per image.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a batch.
        images: images of a refresh.
        original_images: fewer of them for the original, which is compared per image.
        rounds: how often each is timed.
        processes: also this many processes with one thread each, against one; on the CPU.
        process_rounds: how often these are timed.
    """
    if processes == 1 or (processes and device != "cpu"):
        raise ValueError(f"processes={processes} on {device}: expected 0, or at least 2 on the CPU")
    if not HAS_SOLVER:
        print("ortools is not installed: without the original's assignments", flush=True)
    batches = random_batch(size, images, device)[0].split(batch)

    def measured(name: str, each: Pair) -> dict[str, Any]:
        found = measure(each, batches, max(1, original_images // batch), rounds, HAS_SOLVER, device)
        print(f"{name}: {found['per image']['matchdistill']['ratio']['median']:.3f} of the forward passes", flush=True)
        if processes:
            found["processes"] = measure_processes(each, processes, process_rounds, size, batch, images)
            print(f"{name}: {processes} processes {found['processes']['ratio']['median']:.3f} of one", flush=True)
        return found

    by_pair("refresh", device, json, pair, {"size": size, "batch": batch}, measured)

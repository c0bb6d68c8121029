"""What the assignment costs, beside SciPy's dense solver on groups as equal rows, and the original's.

Axes: N batch, K common causes, Cs student channels, Ct teacher channels, G group, H, W positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.harness import interleaved, save, summary
from benchmarks.original import HAS_SOLVER, assignment, problem
from matchdistill import transport
from matchdistill.functional import matching_cost, solve_assignment
from matchdistill.probing import evaluating
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import load_recipe

PROBLEM = "original, its problem alone"


def random_cost(students: int, teachers: int) -> Tensor:
    """Costs (Cs, Ct) without structure."""
    return 4 * torch.rand(students, teachers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def realistic_cost(students: int, teachers: int, causes: int = 64) -> Tensor:
    """Costs (Cs, Ct) of smooth features of two networks that see the same things.

    Every channel is a random mixture of K common smooth maps and of one of its own.
    """
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int) -> Tensor:
        coarse = torch.randn(8, channels, 4, 4, generator=generator)
        return F.interpolate(coarse, size=8, mode="bilinear")

    common = smooth(causes)

    def features(channels: int) -> Tensor:
        mixture = torch.randn(channels, causes, generator=generator) / causes**0.5
        return torch.einsum("ck,nkhw->nchw", mixture, common) + 0.5 * smooth(channels)

    return matching_cost(features(students), features(teachers)).double()


def trained_cost(students: int, teachers: int) -> Tensor:
    """Costs (Cs, Ct) of features of EfficientNet-Lite0 and Lite2 with ImageNet's weights, on 64 images of Fashion-MNIST.

    A channel is a map of a batch norm with 6 x 6 positions; of all these, the last of the network. They need the extra
    transfer and the Debian package dataset-fashion-mnist.

    Raises:
        ImportError: the extra is not installed.
        ValueError: Fashion-MNIST is not there, or there are fewer channels.
    """
    recipe = load_recipe("transfer_fashion_mnist", "--data.image_size=96", "--data.batch_size=64")
    module = build_module(recipe)
    images, _ = next(iter(recipe.data.refresh_dataloader(64, 0)))
    assert module.teacher is not None
    return matching_cost(
        last_maps(module.network(), images, students), last_maps(module.teacher, images, teachers)
    ).double()


def last_maps(network: nn.Module, images: Tensor, channels: int) -> Tensor:
    """The last channels (N, C, 6, 6) of all batch norms of a network, in evaluation."""
    found: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, given, output: found.append(output))
    with torch.no_grad(), evaluating(network):
        network(images)
    maps = torch.cat([each for each in found if each.shape[-1] == 6], 1)
    if maps.shape[1] < channels:
        raise ValueError(f"the network has {maps.shape[1]} channels of 6 x 6 positions: expected at least {channels}")
    return maps[:, -channels:]


def on_equal_rows(cost: Tensor) -> Tensor:
    """The index (Cs, G) by SciPy's dense solver, on G equal rows for each student channel."""
    students, teachers = cost.shape
    group = teachers // students
    _, columns = linear_sum_assignment(cost.repeat(group, 1).numpy())
    return torch.from_numpy(columns).reshape(group, students).T


COSTS: dict[str, Callable[[int, int], Tensor]] = {
    "random": random_cost,
    "realistic": realistic_cost,
    "trained": trained_cost,
}


def measure(cost: Tensor, rounds: int, solver: bool, device: str = "cpu") -> dict[str, Any]:
    """Seconds of the assignments, in turn, the mean costs of the pairs that they find, and how often ours solves a part.

    Of the original, the seconds that it takes to build its problem are there, too.
    """
    solvers = {"matchdistill": solve_assignment, "scipy": on_equal_rows}
    if solver:
        solvers["original"] = assignment
    found = {name: cost.gather(1, solve(cost).to(device)).mean().item() for name, solve in solvers.items()}
    with mock.patch.object(transport, "_matched", wraps=transport._matched) as parts:
        solve_assignment(cost)
    if solver:
        solvers[PROBLEM] = problem
    works = {name: lambda solve=solve: solve(cost) for name, solve in solvers.items()}
    # On a CPU its own seconds count, as other programs may take turns with it.
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = summary(interleaved(works, rounds, device, warmup=0, clock=clock), "matchdistill")
    return {"works": times, "mean cost": found, "parts": parts.call_count}


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    students: Sequence[int] = (512, 1024),
    teachers: int = 2048,
    rounds: int = 3,
) -> None:
    """Time the assignment, in turn with SciPy's dense solver, and with the original's, which needs ortools.

    Args:
        device: where the costs are; they are solved on the CPU.
        json: file of the results; default: under benchmarks/results/speed.
        students: numbers of student channels.
        teachers: teacher channels.
        rounds: how often each is timed.
    """
    if not HAS_SOLVER:
        print("ortools is not installed: without the original's assignment", flush=True)
    results: dict[str, Any] = {"teachers": teachers, "costs": {}}
    for name, make in COSTS.items():
        for count in students:
            try:
                cost = make(count, teachers).to(device)
            except (ImportError, ValueError) as error:
                print(f"{name}: left out ({error})", flush=True)
                continue
            found = results["costs"][f"{name}, {count}"] = measure(cost, rounds, HAS_SOLVER, device)
            for solver, of in found["works"].items():
                mean = found["mean cost"].get(solver)
                told = "" if mean is None else f", mean cost {mean:.6f}"
                print(f"{name}, {count}, {solver}: {of['seconds']:.2f} s{told}", flush=True)
            save(json, "assign", device, results)

"""What the assignment costs, beside the original's.

Axes: N batch, K common causes, Cs student channels, Ct teacher channels, G group, H, W positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import interleaved, save, summary
from benchmarks.original import HAS_SOLVER, assignment
from matchdistill.functional import matching_cost, solve_assignment


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


COSTS = {"random": random_cost, "realistic": realistic_cost}


def measure(cost: Tensor, rounds: int, solver: bool, device: str = "cpu") -> dict[str, Any]:
    """Seconds of the assignments, in turn, and the mean costs of the pairs that they find."""
    solvers = {"matchdistill": solve_assignment}
    if solver:
        solvers["original"] = assignment
    found = {name: cost.gather(1, solve(cost).to(device)).mean().item() for name, solve in solvers.items()}
    works = {name: lambda solve=solve: solve(cost) for name, solve in solvers.items()}
    return {"works": summary(interleaved(works, rounds, device, warmup=0), "matchdistill"), "mean cost": found}


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    students: int = 1024,
    teachers: int = 2048,
    rounds: int = 3,
) -> None:
    """Time the assignment, in turn with the original's, which needs ortools.

    Args:
        device: where the costs are; they are solved on the CPU.
        json: file of the results; default: under benchmarks/results/speed.
        students: student channels.
        teachers: teacher channels.
        rounds: how often each is timed.
    """
    if not HAS_SOLVER:
        print("ortools is not installed: without the original's assignment", flush=True)
    results: dict[str, Any] = {"students": students, "teachers": teachers, "costs": {}}
    for name, make in COSTS.items():
        found = measure(make(students, teachers).to(device), rounds, HAS_SOLVER, device)
        results["costs"][name] = found
        for solver, of in found["works"].items():
            print(f"{name}, {solver}: {of['seconds']:.2f} s, mean cost {found['mean cost'][solver]:.6f}", flush=True)
        save(json, "assign", device, results)

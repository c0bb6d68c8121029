"""How the costs grow: of a position's loss, of its sums and assignment at a refresh, and of a step beside its limit.

Axes: N batch, C channels, Cs student channels, Ct teacher channels, G group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import step
from benchmarks.assign import realistic_cost
from benchmarks.harness import interleaved, save
from benchmarks.pairs import Pair, chosen, random_batch
from matchdistill import MatchingDistiller
from matchdistill.files import atomic_write
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.matched import MatchedPosition
from matchdistill.matching import CostAccumulator

# Of a single loss: teacher channels (the student has half), images, pixels of a side, positions; and what the others are.
SWEEPS = {
    "channels": (64, 128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "side": (4, 8, 16, 32, 64),
    "positions": (1, 2, 4, 8, 16),
}
BASE = {"channels": 512, "batch": 16, "side": 16, "positions": 1}
# Of a whole step.
STEP_SWEEPS = {"batch": (4, 8, 16, 32), "size": (64, 96, 128, 192, 256), "positions": (1, 2, 3, 4)}
STEP_BASE = {"batch": 16, "size": 128, "positions": 4}


def single_position(students: int, teachers: int, device: str) -> MatchedPosition:
    """A position of these widths, matched at random."""

    def network(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU())

    taps = [("2:input", "2:input")]
    distiller = MatchingDistiller(network(teachers), network(students), taps, example=torch.zeros(1, 3, 2, 2)).to(
        device
    )
    (position,) = distiller.positions
    position.index.copy_(random_assignment(torch.zeros(students, teachers)))
    return position


def feature_works(channels: int, batch: int, side: int, positions: int, device: str) -> dict[str, Callable[[], object]]:
    """The loss of given features, forward and backward, and their sums at a refresh."""
    places = [single_position(channels // 2, channels, device) for _ in range(positions)]
    student = torch.randn(batch, channels // 2, side, side, device=device, requires_grad=True)
    teacher = torch.randn(batch, channels, side, side, device=device)
    sums = [CostAccumulator() for _ in places]

    def loss() -> None:
        torch.stack([place.loss(student, teacher, "mean") for place in places]).sum().backward()
        student.grad = None

    def update() -> None:
        for each in sums:
            each.update(student, teacher)

    return {"loss": loss, "update": update}


def features(variable: str, values: Sequence[int], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Median seconds of `feature_works` by the value of one variable."""
    found: dict[str, list[float]] = {}
    for value in values:
        works = feature_works(**{**BASE, variable: value}, device=device)
        for name, seconds in interleaved(works, rounds, device).items():
            found.setdefault(name, []).append(float(np.median(seconds)))
    return {name: curve(values, seconds) for name, seconds in found.items()}


def assignments(values: Sequence[int], rounds: int) -> dict[str, Any]:
    """Median seconds of the assignment by Ct, in groups of two, of costs with structure."""
    seconds = []
    for teachers in values:
        cost: Tensor = realistic_cost(teachers // 2, teachers)
        seconds.append(float(np.median(interleaved({"": lambda cost=cost: solve_assignment(cost)}, rounds)[""])))
    return curve(values, seconds)


def overheads(pair: Pair, variable: str, values: Sequence[int], rounds: int, device: str) -> dict[str, Any]:
    """Median seconds by which a distilled step is above its limit, by the value of one variable."""
    limits, seconds = [], []
    for value in values:
        settings = {**STEP_BASE, variable: value}
        part = replace(pair, taps=pair.taps[-settings["positions"] :])
        images, labels = random_batch(settings["size"], settings["batch"], device)
        works = {name: step.MAKERS[name](part, images, labels) for name in ("limit", "matchdistill")}
        found = interleaved(works, rounds, device)
        limits.append(float(np.median(found["limit"])))
        seconds.append(float(np.median(np.subtract(found["matchdistill"], found["limit"]))))
    return curve(values, seconds) | {"limit": limits}


def curve(values: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Values, seconds and the fitted exponent."""
    return {"values": list(values), "seconds": list(seconds), "exponent": exponent(values, seconds)}


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The slope of log seconds over log values, of the larger half of the values, where what every call costs matters least.

    Seconds that noise has made negative are left out; None: fewer than two are left.
    """
    pairs = list(zip(values, seconds, strict=True))[len(values) // 2 :]
    logs = np.log([pair for pair in pairs if pair[1] > 0])
    return float(np.polyfit(*logs.T, 1)[0]) if len(logs) > 1 else None


def curves(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The measured curves by variable."""
    by_variable = {f"{variable}, a loss": dict(by) for variable, by in found["features"].items()}
    return by_variable | {
        f"{variable}, a step": {"above the limit": curve} for variable, curve in found["step"].items()
    }


def shown(value: float | None) -> str:
    """An exponent as text."""
    return "" if value is None else f"{value:.2f}"


def plot(found: dict[str, Any], path: Path) -> None:
    """The curves of `scale`, both axes logarithmic, with the fitted slopes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "matchdistill"  # the same file for the same results
    from matplotlib import pyplot

    panels = curves(found)
    columns = 4
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=(16, 7), squeeze=False)
    for axis, (variable, by) in zip(axes.flat, panels.items(), strict=False):
        for name, curve in by.items():
            positive = [
                (value, seconds)
                for value, seconds in zip(curve["values"], curve["seconds"], strict=True)
                if seconds > 0
            ]
            (line,) = axis.loglog(
                *np.array(positive).reshape(-1, 2).T, "o", label=f"{name}: {shown(curve['exponent'])}"
            )
            if curve["exponent"] is not None:
                fitted = np.array([pair for pair in positive if pair[0] >= curve["values"][len(curve["values"]) // 2]])
                level = np.exp(np.mean(np.log(fitted[:, 1]) - curve["exponent"] * np.log(fitted[:, 0])))
                axis.loglog(fitted[:, 0], level * fitted[:, 0] ** curve["exponent"], color=line.get_color())
        axis.set_title(variable)
        axis.set_ylabel("seconds")
        axis.legend()
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, metadata={"Date": None}))
    pyplot.close(figure)


def run(
    device: Literal["cpu", "cuda"] = "cpu", json: Path | None = None, rounds: int = 9, step_rounds: int = 9
) -> None:
    """Time the loss, the sums and the assignment of random features, and the steps of ResNet-50 -> ResNet-18, at many sizes.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        rounds: how often each is timed.
        step_rounds: how often a step is.
    """
    (pair,) = chosen("resnet18").values()
    results: dict[str, Any] = {"base": BASE, "step base": STEP_BASE, "features": {}, "step": {}}
    for variable, values in SWEEPS.items():
        results["features"][variable] = features(variable, values, rounds, device)
        if variable == "channels":
            results["features"][variable]["assignment"] = assignments(values, 3)
        print(variable, {name: of["exponent"] for name, of in results["features"][variable].items()}, flush=True)
        save(json, "scale", device, results)
    for variable, values in STEP_SWEEPS.items():
        results["step"][variable] = overheads(pair, variable, values, step_rounds, device)
        print("step,", variable, results["step"][variable]["exponent"], flush=True)
        save(json, "scale", device, results)

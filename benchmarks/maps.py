"""What the maps of an alignment cost, beside a singular value decomposition and the forward passes of a refresh.

Axes: N batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import interleaved, summary
from benchmarks.pairs import Choice, Pair, by_pair
from benchmarks.refresh import forwards
from matchdistill import aligned
from matchdistill.functional import orthogonal_map

IMAGES = 1024  # of the refresh whose forward passes the maps are compared with


def by_decomposition(covariance: Tensor) -> Tensor:
    """The map as it is defined, by singular values."""
    left, _, right = torch.linalg.svd(covariance, full_matrices=False)
    return left @ right


def covariances(pair: Pair, batches: list[Tensor]) -> list[Tensor]:
    """What a refresh finds the maps from, one (Cs, Ct) for each position."""
    found: list[Tensor] = []

    def noted(covariance: Tensor) -> Tensor:
        found.append(covariance)
        return orthogonal_map(covariance)

    with mock.patch.object(aligned, "orthogonal_map", noted):
        pair.distiller(batches[0], reduction="align").refresh(batches)
    return found


def measure(pair: Pair, batches: list[Tensor], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds of the maps of all positions, and of the forward passes, and how far the maps are from the defined ones."""
    found = covariances(pair, batches)
    run = forwards(pair, batches[0])
    works = {
        "forwards": lambda: run(batches),
        "matchdistill": lambda: [orthogonal_map(each) for each in found],
        "svd": lambda: [by_decomposition(each) for each in found],
    }
    seconds = interleaved(works, rounds, device, warmup=1)
    images = sum(map(len, batches))
    seconds["forwards"] = [IMAGES / images * each for each in seconds["forwards"]]
    differences = [(orthogonal_map(each) - by_decomposition(each)).abs().max().item() for each in found]
    return {"works": summary(seconds, "forwards"), "difference": max(differences)}


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    batches: int = 20,
    rounds: int = 3,
) -> None:
    """Time the maps of mgd-align, in turn with singular value decompositions and with forward passes.

    The seconds of the forward passes are those of 1,024 images, by calculation.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a batch.
        batches: that the maps are found from.
        rounds: how often each work is timed.
    """
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(batch, 3, size, size, generator=generator).to(device) for _ in range(batches)]

    def measured(name: str, each: Pair) -> dict[str, Any]:
        found = measure(each, given, rounds, device)
        for work, own in found["works"].items():
            print(f"{name}, {work}: {own['seconds']:.3f} s, {own['ratio']['median']:.4f} of the forwards", flush=True)
        return found

    by_pair("maps", device, json, pair, {"size": size, "batch": batch, "images": IMAGES}, measured)

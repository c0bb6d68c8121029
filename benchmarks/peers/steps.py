"""Steps of the library and of another package in turn, and the most memory that each holds."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.harness import interleaved, machine, summary
from benchmarks.memory import tensor_peak
from matchdistill.files import write_json

PAIR = "resnet50 -> resnet18"


def beside(
    package: str, works: Mapping[str, Callable[[], Callable[[], None]]], json: Path, rounds: int, **settings: int
) -> None:
    """Time the steps that works make, one of them the "limit", and measure the most memory of each.

    Args:
        package: the other one, as it is installed.
        works: each makes its step.
        json: file of the results.
        rounds: how often each step is timed.
        settings: what else is noted.
    """
    found = summary(
        interleaved({name: make() for name, make in works.items()}, rounds, clock=time.process_time), "limit"
    )
    for name, make in works.items():
        found[name]["tensors"] = tensor_peak(make)
        memory = found[name]["tensors"] / found["limit"]["tensors"]
        print(
            f"{name}: {found[name]['ratio']['median']:.3f} of the limit's time, {memory:.3f} of its memory", flush=True
        )
    packages = {package: importlib.metadata.version(package), "torch": torch.__version__}
    main = sys.modules["__main__"].__spec__
    command = shlex.join(["python", "-m", "benchmarks.peers" if main is None else main.name, *sys.argv[1:]])
    results = {**settings, "packages": packages, "pairs": {PAIR: found}}
    write_json(json, {"command": command, "machine": machine("cpu"), "results": results})

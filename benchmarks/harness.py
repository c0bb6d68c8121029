"""What every measurement shares: works timed in turn, what is made of their times, the machine, and the file of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from matchdistill.files import write_json

RESULTS = Path(__file__).parent / "results" / "speed"


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a clock until the work, and the device with it, is done."""
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


class Stopwatch:
    """A function, and the seconds that each of its calls took."""

    def __init__(self, function: Callable[..., Any], device: str = "cpu") -> None:
        self.function, self.device = function, device
        self.seconds: list[float] = []

    def __call__(self, *args: Any) -> Any:
        result = None

        def work() -> None:
            nonlocal result
            result = self.function(*args)

        self.seconds.append(timed(work, self.device))
        return result


def interleaved(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each work by round.

    The works take turns, so that what else the machine does meets all of them; every second round in reverse, so that none
    has always the same one before it. The first calls, which allocate and compile, do not count.
    """
    for work in works.values():
        for _ in range(warmup):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(timed(works[name], device, clock))
    return seconds


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios by round."""
    low, middle, high = np.quantile(np.divide(own, other), [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def summary(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """Of each work the median of its seconds, its ratio to the base, and the rounds."""
    return {
        name: {"seconds": float(np.median(own)), "ratio": ratio(own, seconds[base]), "rounds": list(own)}
        for name, own in seconds.items()
    }


def in_processes(worker: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What the worker returns for each of the arguments, all at once, each in a fresh process."""
    with ProcessPoolExecutor(len(arguments), mp.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(worker, *each) for each in arguments]]


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    described: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": importlib.metadata.version("scipy"),
    }
    if device == "cuda":
        described["TF32 in convolutions"] = torch.backends.cudnn.allow_tf32
    return described


def _cpu() -> str:
    """The model of the CPU, where the system tells, with its instruction set."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({platform.machine()})"


def save(path: Path | None, measurement: str, device: str, results: dict[str, Any]) -> None:
    """Write results, with the command, the machine and the day they are from; None: under `RESULTS`."""
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    path = path or RESULTS / f"{measurement}_{device}.json"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(path, {"command": command, "measured": day, "machine": machine(device), "results": results})
    print(f"{path} written", flush=True)

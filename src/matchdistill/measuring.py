"""What networks and work cost: operations, latency, memory."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matchdistill.probing import unchanged


def network_costs(network: nn.Module, inputs: Any, seconds: float = 0.1) -> dict[str, float]:
    """Operations (a multiplication and its addition are two) of a network for one image, and its median latency in seconds.

    Args:
        network: in evaluation mode; its state is put back afterwards.
        inputs: what it is called with.
        seconds: how long, about, its latency is measured.
    """
    latencies: list[float] = []
    with unchanged(network):
        counted = operations(lambda: network.forward(inputs))  # not of a compiled one, which would be compiled anew
        network(inputs)
        # Whatever else the machine does makes single calls longer: the least one tells how many there is time for.
        while len(latencies) < 3 or (len(latencies) * min(latencies) < seconds and len(latencies) < 100):
            started = _now()
            network(inputs)
            latencies.append(_now() - started)
    return {"operations": counted, "latency": float(torch.tensor(latencies).median())}


def best_batch(network: nn.Module, inputs: Any, most: int = 64, seconds: float = 1.0) -> dict[str, float]:
    """The batch of so many images at which a network takes least time for each, as far as it was tried.

    Args:
        network: in evaluation mode; its state is put back afterwards.
        inputs: what it is called with for one image: a batch (1, ...), or a list of one image.
        most: images of the largest batch that is tried; batches double from 1 on.
        seconds: a batch that would take longer is not tried.

    Returns:
        "batch", and its least "latency" of three in seconds: other work of the machine makes it longer.
    """
    best = {"batch": 1.0, "latency": math.inf}
    with unchanged(network):
        for size in (2**power for power in range(most.bit_length())):
            batch = inputs.repeat(size, *[1] * (inputs.ndim - 1)) if isinstance(inputs, Tensor) else inputs * size
            network(batch)
            latency = math.inf
            for _ in range(3):
                started = _now()
                network(batch)
                latency = min(latency, _now() - started)
            if latency / size >= 0.95 * best["latency"] / best["batch"]:
                break
            best = {"batch": float(size), "latency": latency}
            if 2 * latency > seconds:
                break
    return best


def operations(work: Callable[[], object]) -> int:
    """Floating point operations of the products and convolutions in some work."""
    # Of attention the counter knows what it is made of, not every fused form.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch_memory(device: torch.device) -> None:
    """Begin anew with what `peak_memory` tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # only Linux has it
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were held: on a GPU by its tensors, else by the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found[1])

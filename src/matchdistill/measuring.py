"""What networks and work cost: operations, latency, memory."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
        while len(latencies) < 3 or (sum(latencies) < seconds and len(latencies) < 100):
            started = _now()
            network(inputs)
            latencies.append(_now() - started)
    return {"operations": counted, "latency": float(torch.tensor(latencies).median())}


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

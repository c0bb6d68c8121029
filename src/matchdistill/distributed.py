"""Several processes: which one this is, what they share, and what is this one's share."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_sharded(loader: Iterable[Any]) -> bool:
    """Whether a loader deals the images out to the ranks already.

    Its sampler is a `DistributedSampler` then, or has a true attribute ``sharded``; or Accelerate has prepared the loader.
    """
    from torch.utils.data.distributed import DistributedSampler

    if hasattr(loader, "gradient_state"):  # all of Accelerate's have it, whatever they share out by
        return True
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) or getattr(sampler, "sharded", False) for sampler in samplers)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside of `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_rank_0(value: Tensor) -> Tensor:
    """The value of rank 0 on every rank."""
    if rank_and_world()[1] > 1:
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value


def take_from_rank_0(values: Iterable[Tensor]) -> None:
    """Overwrite values by rank 0's on every rank, as DDP does with what it wraps."""
    if rank_and_world()[1] > 1:
        for value in values:
            value.copy_(from_rank_0(value))


@functools.cache
def leave_at_exit() -> None:
    """Let this process leave its group before it ends, if it is in one then.

    A group of gloo that lives until the interpreter is torn down can abort the process, after its work is done. Lightning
    ends groups of NCCL alone.
    """
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

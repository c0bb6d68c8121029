"""When the matching is refreshed, and this rank's share of the images that it is refreshed from.

Axes: N batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from matchdistill.trace import tensors_in


def due(epoch: int, every: int) -> bool:
    """Whether the matching is refreshed before this epoch (from 0): once before training, then every so many epochs.

    0 for `every` matches once.
    """
    return epoch == 0 or (every > 0 and epoch % every == 0)


def images_of(batch: Any) -> Tensor:
    """The images of a batch: its first tensor.

    Raises:
        ValueError: a batch without a tensor.
    """
    found = tensors_in(batch)
    if not found:
        raise ValueError(
            f"found no images in a batch of type {type(batch).__name__}: expected a tensor, or tuples, lists or "
            "dictionaries of which the first tensor holds the images; else give forward="
        )
    return found[0]


def share(loader: Iterable[Any], max_images: int, rank: int, world: int) -> Iterator[tuple[Any, int]]:
    """This rank's batches of at most `max_images` images over all ranks, each with how many of its images to use.

    A loader whose sampler deals the images out to the ranks already (a `DistributedSampler`, or any with a true attribute
    ``sharded``) is taken as it is; of any other, which must yield the same on all ranks, every world-th batch.
    """
    sharded = world > 1 and _is_sharded(loader)
    left = (max_images - rank + world - 1) // world if sharded else max_images
    for number, batch in enumerate(loader):
        if left <= 0:
            return
        count = min(left, len(images_of(batch)))
        left -= count
        if sharded or number % world == rank:
            yield batch, count


def _is_sharded(loader: Iterable[Any]) -> bool:
    from torch.utils.data.distributed import DistributedSampler

    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) or getattr(sampler, "sharded", False) for sampler in samplers)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside of `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

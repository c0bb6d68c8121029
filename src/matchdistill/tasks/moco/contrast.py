"""Momentum contrast as tensor functions: the loss, the queue of keys, the momentum, and keys of several processes.

K. He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020.

Axes: N images of this process, M images of all processes, K keys in the queue, D embedding; an asterisk is any others.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor

from matchdistill.distributed import from_rank_0, rank_and_world


def contrastive_logits(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """How alike each query is to its own key, in column 0, and to the keys of other images (N, 1 + K).

    Args:
        queries: (N, D), of length 1.
        keys: of the same images (N, D), likewise; no gradient goes to them.
        queue: keys of other images (K, D), likewise.
        temperature: what the cosines are divided by.
    """
    positive = (queries * keys.detach()).sum(1, keepdim=True)
    return torch.cat([positive, queries @ queue.detach().T], 1) / temperature


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE, the mean over the images: cross-entropy of `contrastive_logits`, whose right answer is column 0."""
    logits = contrastive_logits(queries, keys, queue, temperature)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def new_queue(length: int, dimensions: int, generator: Generator | None = None) -> Tensor:
    """A queue (K, D) before the first step: random keys of length 1."""
    return F.normalize(torch.randn(length, dimensions, generator=generator), dim=1)


def enqueue(queue: Tensor, place: Tensor, keys: Tensor) -> None:
    """Put keys (M, D) over the oldest ones of a queue (K, D), in place.

    Args:
        queue: its length is a multiple of M.
        place: where the oldest key is, int64; afterwards where the oldest one is then.
        keys: of all processes.
    """
    assert len(queue) % len(keys) == 0
    queue.index_copy_(0, place + torch.arange(len(keys), device=place.device), keys)
    place.add_(len(keys)).remainder_(len(queue))


@torch.no_grad()
def follow(followers: Iterable[Tensor], leaders: Iterable[Tensor], momentum: float) -> None:
    """Move each follower, in place, towards its leader: ``momentum * follower + (1 - momentum) * leader``."""
    for follower, leader in zip(followers, leaders, strict=True):
        follower.mul_(momentum).add_(leader, alpha=1 - momentum)


def of_all(values: Tensor) -> Tensor:
    """The values (N, *) of all processes, rank by rank (M, *); N is the same in each."""
    world = rank_and_world()[1]
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def share_of(values: Tensor) -> Tensor:
    """This process's values (N, *) of all processes' (M, *)."""
    rank, world = rank_and_world()
    return values.chunk(world)[rank]


def drawn_order(count: int, seed: int, device: torch.device) -> Tensor:
    """A random order (M,) of the images of all processes: what rank 0 draws, in every process."""
    return from_rank_0(torch.randperm(count, generator=Generator().manual_seed(seed)).to(device))


def shuffled(values: Tensor, order: Tensor) -> Tensor:
    """What this process gets (N, *) when the values (N, *) of all processes are dealt out in an order (M,)."""
    return share_of(of_all(values)[order])


def put_back(values: Tensor, order: Tensor) -> Tensor:
    """The values (M, *) of all processes in the order that they had before `shuffled` dealt them out by the order (M,)."""
    return of_all(values)[order.argsort()]

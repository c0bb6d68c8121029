"""Which images a process sees and in which order: a function of (seed, epoch, rank) alone.

So a run that was killed and resumed at an epoch repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)


def rank_and_world() -> tuple[int, int]:
    """Number of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mix_seed(*parts: int) -> int:
    """One seed of 32 bits from several numbers.

    A sum would not do: seed 0 in epoch 1 would be seed 1 in epoch 0, and runs with neighbouring seeds would repeat
    each other one epoch later.

    Example:
        >>> mix_seed(0, 1) == mix_seed(1, 0)
        False
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EpochSampler(DistributedSampler[Any]):
    """Shuffled indices of this rank's share.

    Args:
        dataset: what is sampled from.
        seed: of the run.
        generator: that of the loader. It seeds the worker processes, so each epoch starts by seeding it.
        rank: of this process; None asks ``torch.distributed``.
        world: number of processes, likewise.
    """

    sharded = True  # the loader gives this rank's share already

    def __init__(
        self, dataset: Dataset[Any], seed: int, generator: Generator, rank: int | None = None, world: int | None = None
    ) -> None:
        default_rank, default_world = rank_and_world()
        super().__init__(
            dataset,
            num_replicas=default_world if world is None else world,
            rank=default_rank if rank is None else rank,
            seed=mix_seed(seed),  # DistributedSampler adds the epoch
        )
        self.run_seed = seed
        self.generator = generator
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the workers' random numbers; Lightning calls it before each epoch."""
        super().set_epoch(epoch)
        self.generator.manual_seed(mix_seed(self.run_seed, epoch, self.rank))


class ShareSampler(Sampler[int]):
    """The given indices in the given order: a share that was cut out for this rank."""

    sharded = True

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class BatchLoader(DataLoader[Batch]):
    """A loader of datasets whose ``__getitems__`` returns the batch ready-made."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that nothing happens before the first batch is asked for: a resumed Lightning run calls
        # iter() before it calls set_epoch(), and worker processes would start in the order of epoch 0.
        batches = cast(Iterator[Batch], super().__iter__())
        try:
            yield from batches
        except ValueError as error:
            # From a worker process it arrives with that process's traceback as text. The last line is the message.
            message = str(error).strip().splitlines()[-1]
            raise ValueError(message.removeprefix("ValueError: ")) from error


def make_loader(dataset: Dataset[Any], **arguments: Any) -> BatchLoader:
    """A loader with what all have in common."""
    return BatchLoader(dataset, collate_fn=_as_it_is, pin_memory=torch.cuda.is_available(), **arguments)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def balanced_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices (size,), ascending, of a random subset in which the classes (N labels) differ by one image at most.

    A class that has too few images gives all that it has, and the others make up for it.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
        >>> labels[balanced_subset(labels, 5, seed=0)]
        tensor([0, 0, 1, 1, 2])
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(mix_seed(seed)))
    shuffled = labels[order]
    counts = shuffled.bincount()
    # The turn of an image is its place in its own class; the subset takes all first turns, then all second ones...
    by_class = shuffled.argsort(stable=True)
    turns = torch.empty_like(order)
    turns[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[shuffled[by_class]]
    return order[turns.argsort(stable=True)[:size]].sort().values


def strided_batches(count: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Batches of indices that give each of ``count`` images to one rank, once, and every rank equally many batches.

    Padding with repeated images would bias the metrics; unequal numbers of batches would leave a rank waiting for
    the others, as DistributedDataParallel exchanges buffers in every forward pass, validation included.

    Example:
        >>> strided_batches(7, 3, rank=0, world=2), strided_batches(7, 3, rank=1, world=2)
        ([[0, 2], [4, 6]], [[1, 3], [5]])
    """
    largest_share = -(-count // world)
    batches = -(-largest_share // batch_size)
    return [part.tolist() for part in torch.arange(rank, count, world).tensor_split(batches)]

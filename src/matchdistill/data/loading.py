"""Which images a process sees and in which order: a function of (seed, epoch, rank) alone.

So a run that was killed and resumed at an epoch repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from matchdistill.distributed import rank_and_world
from matchdistill.messages import counted
from matchdistill.slots import checksum

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)


def mix_seed(*parts: int | str) -> int:
    """One seed of 32 bits from a purpose and several numbers.

    A sum would not do: seed 0 in epoch 1 would be seed 1 in epoch 0, and runs with neighbouring seeds would repeat
    each other one epoch later.

    Examples:
        >>> mix_seed("order", 0, 1) == mix_seed("order", 1, 0)
        False
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


class EpochSampler(DistributedSampler[Any]):
    """Shuffled indices of this rank's share, each several times in a row where augmentation is repeated.

    The repeats are those of timm, dealt out to the ranks in turn. An epoch is as long as without them, so it takes that part
    of the images only.

    Args:
        dataset: what is sampled from.
        seed: of the run.
        generator: that of the loader. It seeds the worker processes, so each epoch starts by seeding it.
        rank: of this process; None asks ``torch.distributed``.
        world: number of processes, likewise.
        repeats: how often each image comes.
        views: of `FixedViews` of the data set, in which case each epoch has the numbers of the next view of all images; 0:
            the data set has none.
    """

    sharded = True  # tells MatchingDistiller.refresh that the loader gives this rank's share only

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int,
        generator: Generator,
        rank: int | None = None,
        world: int | None = None,
        repeats: int = 1,
        views: int = 0,
    ) -> None:
        default_rank, default_world = rank_and_world()
        super().__init__(
            dataset,
            num_replicas=default_world if world is None else world,
            rank=default_rank if rank is None else rank,
            seed=mix_seed("order", seed),  # DistributedSampler adds the epoch
        )
        self.run_seed = seed
        self.generator = generator
        self.repeats, self.views = repeats, views
        self.set_epoch(0)

    def __iter__(self) -> Iterator[Any]:
        """The indices of the epoch, or of its views."""
        if self.views:
            first = first_of_view(self.epoch, self.views, len(self.dataset))  # type: ignore[arg-type]
            return (first + index for index in super().__iter__())
        if self.repeats == 1:
            return super().__iter__()
        from timm.data.distributed_sampler import RepeatAugSampler

        options = {"num_repeats": self.repeats, "selected_round": 0}
        sampler = RepeatAugSampler(self.dataset, self.num_replicas, self.rank, **options)  # type: ignore[no-untyped-call]
        sampler.set_epoch(self.seed + self.epoch)  # type: ignore[no-untyped-call]
        return iter(sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the workers' random numbers; Lightning calls it before each epoch."""
        super().set_epoch(epoch)
        self.generator.manual_seed(mix_seed("workers", self.run_seed, epoch, self.rank))


class ShareSampler(Sampler[int]):
    """The given indices in the given order: a share that was cut out for this rank."""

    sharded = True

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class BatchLoader(DataLoader[Any]):
    """A loader of datasets whose ``__getitems__`` returns the batch ready-made."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing happens before the first batch is asked for: a resumed Lightning run calls
        # iter() before it calls set_epoch(), and worker processes would start in the order of epoch 0.
        batches = cast(Iterator[Any], super().__iter__())
        try:
            yield from batches if self.num_workers else _drawn_apart(batches, self.generator)
        except ValueError as error:
            # From a worker process it arrives with that process's traceback as text; the message comes last.
            traceback, _, message = str(error).rpartition("\nValueError: ")
            if not traceback:
                raise
            raise ValueError(message.strip()) from error
        finally:
            # An iterator that is left to the garbage collector, as after an error, waits 5 s for each worker.
            getattr(batches, "_shutdown_workers", lambda: None)()


class Viewed(NamedTuple):
    """A batch of fixed views of images.

    Attributes:
        batch: what it is without its numbers.
        numbers: of each image (N, 2) int64 the number of its view, and the checksum of its pixels.
    """

    batch: Any
    numbers: Tensor


class FixedViews(Dataset[Any]):
    """A data set of which each image comes in a few views, that have always the same pixels.

    What varies an image draws from random numbers of that image and view alone. View v of image i of N has the number
    ``v * N + i``.

    Args:
        dataset: gives batches (images, ...) by ``__getitems__``, as tensors whose first axis is that of images, and draws
            from torch's random numbers alone.
        views: of each image.
    """

    def __init__(self, dataset: Any, views: int) -> None:
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def __getitems__(self, numbers: Sequence[int]) -> Viewed:
        """The views of these numbers."""
        samples = []
        for number in numbers:
            view, index = divmod(number, len(self.dataset))
            torch.default_generator.manual_seed(mix_seed("view", index, view))
            samples.append(self.dataset.__getitems__([index]))
        batch = tuple(torch.cat(parts) for parts in zip(*samples, strict=True))
        told = [[number, checksum(image)] for number, image in zip(numbers, batch[0], strict=True)]
        return Viewed(batch, torch.tensor(told).view(-1, 2))


def first_of_view(time: int, views: int, images: int) -> int:
    """The number of the first image's view in an epoch or the like; see `FixedViews`.

    Examples:
        >>> [first_of_view(epoch, views=2, images=10) for epoch in range(3)]
        [0, 10, 0]
    """
    return time % views * images


def _drawn_apart(batches: Iterator[Any], generator: Generator) -> Iterator[Any]:
    """Batches whose augmentation has random numbers of its own, as in worker processes.

    So the images do not depend on what else is drawn between them: dropout, random reductions, a refresh.
    """
    state = Generator().manual_seed(generator.initial_seed()).get_state()
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            batch = next(batches, None)
        finally:
            state = torch.get_rng_state()
            torch.set_rng_state(outside)
        if batch is None:
            return
        yield batch


def as_it_is(batch: Any) -> Any:
    """The collate function of :class:`BatchLoader`; by name, as lambdas do not reach spawned workers."""
    return batch


def balanced_subset(labels: Tensor, size: int, seed: int, first: int = 0) -> Tensor:
    """Indices (size,), ascending, of a random subset in which the classes (N labels) differ by one image at most.

    A class that has too few images gives all that it has, and the others make up for it. The subset is the images
    from place ``first`` on of a random order that all sizes share, so that subsets of one seed can be disjoint; where
    ``first`` is no multiple of the number of classes, they may differ by two.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
        >>> labels[balanced_subset(labels, 5, seed=0)]
        tensor([0, 0, 1, 1, 2])
        >>> labels[balanced_subset(labels, 2, seed=0, first=5)]
        tensor([0, 0])
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(mix_seed("subset", seed)))
    shuffled = labels[order]
    counts = shuffled.bincount()
    # The turn of an image is its place in its own class; the order is all first turns, then all second ones...
    by_class = shuffled.argsort(stable=True)
    turns = torch.empty_like(order)
    turns[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[shuffled[by_class]]
    return order[turns.argsort(stable=True)[first : first + size]].sort().values


def strided_batches(count: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Batches of indices that give each of ``count`` images to one rank, once, and every rank equally many batches.

    Padding with repeated images would bias the metrics; unequal numbers of batches would leave a rank waiting for
    the others, as DistributedDataParallel exchanges buffers in every forward pass, validation included.

    Examples:
        >>> strided_batches(7, 3, rank=0, world=2), strided_batches(7, 3, rank=1, world=2)
        ([[0, 2], [4, 6]], [[1, 3], [5]])
    """
    if count < world:
        images = counted(count, "validation image")
        raise ValueError(f"{images} cannot be shared among {world} processes: use fewer processes")
    # As many as the largest share needs, but no more than the smallest can fill.
    batches = min(-(-count // (world * batch_size)), count // world)
    return [part.tolist() for part in torch.arange(rank, count, world).tensor_split(batches)]

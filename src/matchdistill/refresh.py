"""When the matching is refreshed, and from which images.

Axes: N batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from matchdistill.distributed import is_sharded, rank_and_world
from matchdistill.options import amount
from matchdistill.trace import tensors_in

# Images before the first check of a refresh with a tolerance: four doublings are less than a fifth of 20,000, the default.
FIRST_CHECK = 240
SHARE = 0.1  # of the images of the steps, that refreshes see at most where nothing else is said


def check_refreshes(every: int | Sequence[int], max_images: int) -> None:
    """Raise unless a trainer can refresh by these numbers of epochs and of images.

    Raises:
        ValueError: numbers that are not whole, negative epochs, or no image.

    Examples:
        >>> check_refreshes("daily", 100)
        Traceback (most recent call last):
        ValueError: refresh_every is 'daily': expected a whole number of epochs, 0 for once, or the epochs as a list
    """
    epochs = [every] if isinstance(every, int) else every
    if isinstance(every, str | bool) or not all(isinstance(epoch, int) and epoch >= 0 for epoch in epochs):
        raise ValueError(
            f"refresh_every is {every!r}: expected a whole number of epochs, 0 for once, or the epochs as a list"
        )
    if not isinstance(max_images, int) or max_images < 1:
        raise ValueError(f"max_images is {max_images!r}: expected a whole number of images from 1 on")


def due(epoch: int, every: int | Sequence[int]) -> bool:
    """Whether the matching is refreshed before this epoch (from 0): once before training, then every so many epochs.

    0 for `every` matches once; a sequence has the epochs themselves.
    """
    if isinstance(every, int):
        return epoch == 0 or (every > 0 and epoch % every == 0)
    return epoch == 0 or epoch in every


def rarely(images: int, trained: int) -> int:
    """Epochs between refreshes that see at most `SHARE` of the images that the steps see.

    Args:
        images: the most of a refresh.
        trained: images of an epoch.

    Examples:
        >>> rarely(20_000, 600), rarely(20_000, 50_000), rarely(20_000, 1_281_167)
        (10, 4, 1)
    """
    return math.ceil(min(images, trained) / (SHARE * trained))


def are_phases(phases: Sequence[Sequence[int]]) -> bool:
    """Whether `due_at_step` takes them: pairs of whole numbers from 0 on, ascending, the first from step 0.

    Examples:
        >>> are_phases([[0, 5000], [20_000, 31_000]]), are_phases([[100, 50]]), are_phases([0, 5000]), are_phases([])
        (True, False, False, False)
    """

    def is_pair(phase: object) -> bool:
        return isinstance(phase, list | tuple) and [type(number) for number in phase] == [int, int] and min(phase) >= 0

    return all(map(is_pair, phases)) and [first for first, _ in phases] == sorted({0, *(first for first, _ in phases)})


def due_at_step(step: int, phases: Sequence[Sequence[int]]) -> bool:
    """Whether the matching is refreshed before this step (from 0).

    Args:
        step: of the optimiser.
        phases: [from step, every], ascending, as `are_phases` wants them: from that step on, at the steps that are
            multiples of `every`; at none but step 0 where it is 0.

    Examples:
        >>> [step for step in range(0, 70_000, 500) if due_at_step(step, [[0, 5000], [20_000, 31_000]])]
        [0, 5000, 10000, 15000, 31000, 62000]
    """
    every = [every for first, every in phases if first <= step][-1]
    return step == 0 or (every > 0 and step % every == 0)


def doublings(first: int, below: int) -> list[int]:
    """`first` and its doubles below a number.

    Examples:
        >>> doublings(256, 2000)
        [256, 512, 1024]
    """
    return [] if first >= below else [first, *doublings(2 * first, below)]


def images_of(batch: Any) -> Tensor:
    """The images of a batch: its first tensor that can be images, (N, C, ...); else its first (N, C); else its first.

    Raises:
        ValueError: a batch without a tensor.
    """
    found = tensors_in(dict(batch) if isinstance(batch, Mapping) else batch)
    if not found:
        raise ValueError(
            f"found no images in a batch of type {type(batch).__name__}: expected a tensor, or tuples, lists or "
            "dictionaries of which one tensor holds the images; else give forward="
        )
    return next((value for axes in (3, 2) for value in found if value.ndim >= axes), found[0])


def check_loader(loader: Any) -> None:
    """Raise a ValueError unless a loader gives batches."""
    if isinstance(loader, Tensor) or (hasattr(loader, "__getitem__") and isinstance(loader, Dataset)):
        kind = "tensor" if isinstance(loader, Tensor) else "data set"
        raise ValueError(f"the loader is a {kind}: expected batches, such as a DataLoader or [images]")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ValueError(f"the loader is a {type(loader).__name__}: expected batches, such as a DataLoader or [images]")


class RankBatches:
    """The batches of a refresh that this process runs, and the count of images over all processes.

    Iterate over it, and report after each batch how many images it had with `took`. If the loader deals the images out to
    the processes, each one runs all that it gets; otherwise every process reads all batches and runs each world-th one.

    Where a tolerance is given, the iteration stops for a check at `FIRST_CHECK` images and at each doubling. All processes
    come to every check, since it compares what all of them have seen.

    Args:
        loader: batches.
        max_images: the most images, over all processes.
        whole: whether batches are run as they are and only then counted; otherwise the last one is cut to the limit.
        tolerance: of the check; None: there are none.
        settled: makes a check: whether the images so far are enough, given the number of images at the next check.

    Attributes:
        limit: how many images of the current batch to run; None: all of them.
        alone: whether there is no other process.

    Raises:
        ValueError: a loader that gives no batches, or limits out of range.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        max_images: int,
        whole: bool,
        tolerance: float | None,
        settled: Callable[[float], bool],
    ) -> None:
        check_loader(loader)
        if not isinstance(max_images, int) or max_images < 1:
            raise ValueError(f"max_images={max_images!r}: expected at least 1, a whole number")
        if tolerance is not None and not amount(tolerance):
            raise ValueError(f"tolerance={tolerance}: expected a share of the objective, 0 or more, or None")
        self._loader, self._whole, self._settled = loader, whole, settled
        self._checks = [] if tolerance is None else doublings(FIRST_CHECK, max_images)
        self._rank, world = rank_and_world()
        self.alone = world == 1
        self._stride = 1 if self.alone or is_sharded(loader) else world  # in batches, from one of its own to the next
        # The other processes' images pass by and are counted, or are as many as this one's, about.
        counts_own = whole or self._stride == 1
        self._left = len(range(self._rank, max_images, world)) if counts_own else max_images
        self._each_stands_for = world if counts_own else 1
        self._seen = self._count = 0
        self.limit: int | None = None

    def took(self, images: int) -> None:
        """Tell how many images the current batch had."""
        self._count = images

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._loader if self._left > 0 else ()):
            self._count = 0 if self._whole else min(self._left, len(images_of(batch)))
            if self._stride == 1 or number % self._stride == self._rank:
                self.limit = None if self._whole else self._count
                yield batch
            self._left -= self._count
            self._seen += self._count * self._each_stands_for
            if self._left <= 0:  # before another batch is loaded
                break
            if self._enough(self._seen):
                return
        if not self.alone:  # the other processes may have more images
            self._enough(math.inf)

    def _enough(self, seen: float) -> bool:
        """Make the checks that so many images have come to, until one finds that they are enough."""
        while self._checks and seen >= self._checks[0]:
            del self._checks[0]
            if self._settled(self._checks[0] if self._checks else math.inf):
                return True
        return False

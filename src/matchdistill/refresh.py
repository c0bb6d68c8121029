"""When the matching is refreshed, and from which images.

Axes: N batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from matchdistill.trace import tensors_in


def due(epoch: int, every: int | Sequence[int]) -> bool:
    """Whether the matching is refreshed before this epoch (from 0): once before training, then every so many epochs.

    0 for `every` matches once; a sequence has the epochs themselves.
    """
    if isinstance(every, int):
        return epoch == 0 or (every > 0 and epoch % every == 0)
    return epoch == 0 or epoch in every


def due_at_step(step: int, phases: Sequence[Sequence[int]]) -> bool:
    """Whether the matching is refreshed before this step (from 0).

    Args:
        step: of the optimiser.
        phases: [from step, every], ascending: from that step on, at the steps that are multiples of `every`; at none
            but step 0 where it is 0.

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

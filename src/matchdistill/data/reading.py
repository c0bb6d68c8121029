"""Data sets whose images are files, some of which may be damaged."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from matchdistill.data.pictures import Picture, Place, read_picture, unreadable
from matchdistill.messages import printable


class FileDataset(Dataset[Any], ABC):
    """Images read from files when they are asked for.

    Args:
        paths: the files, or what opens them.
        skip_corrupt: leave images that cannot be read out of their batch, with a warning at the first meeting. If
            too few are left (none; in training one, which batch norm cannot take), the images that follow in the
            data set fill up: every process still makes the same number of steps.
        fewest: how many images a batch needs.
        read: what reads a file.
    """

    def __init__(
        self,
        paths: Sequence[Place],
        skip_corrupt: bool,
        fewest: int = 1,
        read: Callable[[Place], Picture] = read_picture,
    ) -> None:
        self.paths = paths
        self.skip_corrupt = skip_corrupt
        self.fewest = fewest
        self.read = read
        # In shared memory: worker processes find corrupt images, the main process counts them.
        self.corrupt = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def corrupt_paths(self) -> list[str]:
        """The corrupt images found so far."""
        return [printable(str(self.paths[i])) for i in self.corrupt.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> Any:
        """One image with what belongs to it, or None for a corrupt image that is to be skipped."""
        if self.corrupt[index]:
            return None
        path = self.paths[index]
        try:
            picture = self.read(path)
            self._check(index, picture)
        except Exception as error:  # Pillow's readers fail in every way on damaged files
            message = unreadable(str(path), error)
            if not self.skip_corrupt:
                raise ValueError(
                    f"{message}: repair or remove it, or skip such images with --data.skip_corrupt=true"
                ) from error
            self.corrupt[index] = True
            warnings.warn(f"{message} and is skipped", stacklevel=2)
            return None
        return self._sample(index, picture)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch of images without the corrupt ones."""
        samples = [sample for index in indices if (sample := self[index]) is not None]
        fewest = min(self.fewest, len(indices))
        for step in range(1, len(self) + 1):
            if len(samples) >= fewest:
                break
            if (sample := self[(indices[-1] + step) % len(self)]) is not None:
                samples.append(sample)
        if not samples:
            raise ValueError(f"none of the {len(self)} images beside {self.paths[0]} can be read")
        return self._batch(samples)

    def _check(self, index: int, picture: Picture) -> None:
        """Whatever this raises makes an image a corrupt one."""

    @abstractmethod
    def _sample(self, index: int, picture: Picture) -> Any:
        """A picture as a tensor with what belongs to it."""

    @abstractmethod
    def _batch(self, samples: list[Any]) -> Any:
        """Samples as a batch."""

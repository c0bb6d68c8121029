"""What the data modules of all tasks have in common: which images, in which order, in which process."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from matchdistill.data.loading import (
    BatchLoader,
    EpochSampler,
    ShareSampler,
    as_it_is,
    balanced_subset,
    mix_seed,
    strided_batches,
)
from matchdistill.data.pictures import read_picture
from matchdistill.data.reading import FileDataset
from matchdistill.distributed import rank_and_world
from matchdistill.messages import LARGEST, number, whole

MOST_WORKERS = 1024


class DataModule(pl.LightningDataModule, ABC):
    """Training and validation images, shared among processes and loaded in batches.

    Usable without a trainer too: call ``setup()``, then ask for loaders. Randomness is a function of seed, epoch and
    rank, and of the number of workers. A subclass says what its images are.

    Args:
        problems: what is wrong with the subclass's own arguments.
        batch_size: images per step and process.
        workers: processes that load images; 0 loads in the training process.
        train_part: [first, last]: a part of the training images in a random order that is the same for every seed.
        val_part: likewise of the validation images.
        train_limit: how many of the training images, a random choice by ``seed``.
        val_limit: how many of the validation images, a random choice that is the same for every ``seed``.
        skip_corrupt: leave out images that cannot be read.
        white: the value of white in images of more than 8 bits.
        max_pixels: the most pixels of an image.
        seed: of the order, the choice by ``train_limit`` and the workers' augmentation.

    Raises:
        ValueError: in one line, all problems with the arguments.
    """

    fewest: ClassVar[int] = 2  # training images of a batch: batch norm cannot take one
    num_classes: int
    class_names: list[str]
    train_set: Any  # a Dataset that has a length
    val_set: Any

    def __init__(
        self,
        problems: list[str],
        batch_size: int,
        workers: int,
        train_part: list[int] | None,
        val_part: list[int] | None,
        train_limit: int | None,
        val_limit: int | None,
        skip_corrupt: bool,
        white: float | None,
        max_pixels: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        problems = [
            *problems,
            *whole("data.batch_size", batch_size, 1),
            *whole("data.workers", workers, 0, MOST_WORKERS),
            *whole("data.train_limit", train_limit, 1),
            *whole("data.val_limit", val_limit, 1),
            *whole("data.max_pixels", max_pixels, 1),
            *number("data.white", white, 0, above=True),
        ]
        for argument, part in (("train_part", train_part), ("val_part", val_part)):
            if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= LARGEST):
                problems.append(
                    f"data.{argument} is {part}: expected two whole numbers [first, last], first from 0 on, last larger"
                )
        if problems:
            raise ValueError("; ".join(problems))
        self.batch_size = batch_size
        self.workers = workers
        self.train_part = train_part
        self.val_part = val_part
        self.train_limit = train_limit
        self.val_limit = val_limit
        self.skip_corrupt = skip_corrupt
        self.read = functools.partial(read_picture, white=white, max_pixels=max_pixels)
        self.seed = seed

    @abstractmethod
    def _read(self) -> tuple[Any, Any, list[str]]:
        """Training images, validation images and class names; the images have a method ``subset(index)``."""

    @abstractmethod
    def _groups(self, images: Any) -> Tensor:
        """Numbers (N,) int64 of the groups that a random choice among the images keeps in balance."""

    @abstractmethod
    def _dataset(self, images: Any, training: bool) -> Dataset[Any]:
        """Images as they are fed to the network, in batches by ``__getitems__``."""

    def setup(self, stage: str | None = None) -> None:
        """Read the images or, where each is a file, their names. Further calls do nothing."""
        if hasattr(self, "train_set"):
            return
        train, val, self.class_names = self._read()
        self.num_classes = len(self.class_names)
        val = self._chosen(self._chosen(val, "val_part", self.val_part, 0), "val_limit", self.val_limit, 0)
        self.val_set = self._dataset(val, training=False)
        train = self._chosen(train, "train_part", self.train_part, 0)
        self.train_set = self._dataset(self._chosen(train, "train_limit", self.train_limit, self.seed), training=True)

    def _chosen(self, images: Any, argument: str, value: int | Sequence[int] | None, seed: int) -> Any:
        """So many images, or those of a part [first, last], at random with groups in balance."""
        if value is None:
            return images
        groups = self._groups(images)
        first, last = (0, value) if isinstance(value, int) else value
        if last > len(groups):
            raise ValueError(f"data.{argument} is {value}, but there are only {len(groups)} images")
        return images.subset(balanced_subset(groups, last - first, seed, first))

    def check_shares(self, world: int) -> None:
        """Raise a ValueError unless there are enough images for so many processes."""
        self.setup()
        if -(-len(self.train_set) // world) < self.fewest:
            raise ValueError(
                f"{len(self.train_set)} training images for {world} processes: each needs {self.fewest} at least"
            )
        strided_batches(len(self.val_set), self.batch_size, 0, world)

    def train_dataloader(self) -> BatchLoader:
        """This rank's share of the training images, shuffled anew in each epoch that its sampler is told of."""
        self.setup()
        rank, world = rank_and_world()
        self.check_shares(world)
        generator = Generator()
        sampler = EpochSampler(self.train_set, self.seed, generator, rank, world)
        # Batch norm cannot take a batch of one image, which the last one might be, so an incomplete batch is
        # dropped; in the next epoch other images fall into it. If all images are less than a batch, they are one.
        drop_last = len(sampler) >= self.batch_size
        return self._loader(self.train_set, generator, batch_size=self.batch_size, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> BatchLoader:
        """This rank's share of the validation images: over all ranks, each image once."""
        self.setup()
        batches = strided_batches(len(self.val_set), self.batch_size, *rank_and_world())
        # Nothing is random here, but without a generator of its own the loader would draw from the global one.
        return self._loader(self.val_set, Generator(), batch_sampler=batches)

    def refresh_dataloader(self, max_images: int, epoch: int) -> BatchLoader:
        """This rank's share of up to ``max_images`` random training images, to solve the matching from.

        Which images depends on seed and epoch only, and they are varied as in training, as the paper draws them from
        the training loader. If there are fewer images than ranks, the loader of some ranks is empty.
        """
        self.setup()
        if max_images < 1:
            raise ValueError(f"max_images is {max_images}: a refresh of the matching needs at least one image")
        rank, world = rank_and_world()
        choice = Generator().manual_seed(mix_seed("refresh", self.seed, epoch))
        chosen = torch.randperm(len(self.train_set), generator=choice)[:max_images]
        generator = Generator().manual_seed(mix_seed("refresh workers", self.seed, epoch, rank))
        sampler = ShareSampler(chosen[rank::world].tolist())
        return self._loader(self.train_set, generator, batch_size=self.batch_size, sampler=sampler)

    def _loader(self, dataset: Dataset[Any], generator: Generator, **batching: Any) -> BatchLoader:
        # Workers are not kept from epoch to epoch (persistent_workers): they could not be seeded anew.
        return BatchLoader(
            dataset,
            num_workers=self.workers,
            collate_fn=as_it_is,
            generator=generator,
            pin_memory=torch.cuda.is_available(),
            **batching,
        )

    @property
    def corrupt(self) -> list[str]:
        """Images that this process and its workers have skipped so far."""
        sets = (getattr(self, name, None) for name in ("train_set", "val_set"))
        return [path for images in sets if isinstance(images, FileDataset) for path in images.corrupt_paths]

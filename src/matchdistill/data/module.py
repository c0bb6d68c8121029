"""What the data modules of all tasks have in common: which images, in which order, in which process."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from matchdistill.data.loading import (
    BatchLoader,
    EpochSampler,
    FixedViews,
    ShareSampler,
    as_it_is,
    balanced_subset,
    first_of_view,
    mix_seed,
    strided_batches,
)
from matchdistill.data.pictures import read_picture
from matchdistill.data.reading import FileDataset
from matchdistill.distributed import rank_and_world
from matchdistill.files import path_of
from matchdistill.messages import LARGEST, counted, did_you_mean, number, whole
from matchdistill.models.preparation import IMAGENET, Preparation

MOST_WORKERS = 1024

Sources = Mapping[str, Sequence[str]]  # of options, by the library that they are from; all others are our own


@dataclass(kw_only=True)
class DataOptions:
    """The options that all data modules share.

    Args:
        batch_size: images per step and process.
        workers: processes that load images; 0 loads in the training process.
        train_part: [first, last]: of the training images in a random order that is the same for every ``seed``, those
            from ``first`` to before ``last``; ``train_limit`` chooses among them. For disjoint images of teacher and
            student.
        val_part: likewise of the validation images. For disjoint images to choose settings by and to report.
        train_limit: use that many training images, a random choice by ``seed``.
        val_limit: use that many validation images, likewise but the same for every ``seed``.
        skip_corrupt: leave out images that cannot be read, with a warning, instead of stopping.
        white: the value that is white in images of more than 8 bits; null: 65535, and of floating-point numbers 1.
        max_pixels: the most pixels of an image; null: 179 million, so that no small damaged file fills the memory.
        seed: what the order, the choice by ``train_limit`` and the workers' random numbers follow from.
    """

    sources: ClassVar[Sources] = {"torch": ("batch_size", "workers")}
    # What changes nothing of a result, so that it may change where a run goes on: where the data is, and how it comes in.
    indifferent: ClassVar[frozenset[str]] = frozenset({"workers", "skip_corrupt"})

    batch_size: int = 64
    workers: int = 0
    train_part: list[int] | None = None
    val_part: list[int] | None = None
    train_limit: int | None = None
    val_limit: int | None = None
    skip_corrupt: bool = False
    white: float | None = None
    max_pixels: int | None = None
    seed: int = 0

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        yield from whole(f"{prefix}.batch_size", self.batch_size, 1)
        yield from whole(f"{prefix}.workers", self.workers, 0, MOST_WORKERS)
        yield from whole(f"{prefix}.train_limit", self.train_limit, 1)
        yield from whole(f"{prefix}.val_limit", self.val_limit, 1)
        yield from whole(f"{prefix}.max_pixels", self.max_pixels, 1)
        yield from number(f"{prefix}.white", self.white, 0, above=True)
        for name, part in (("train_part", self.train_part), ("val_part", self.val_part)):
            if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= LARGEST):
                yield (
                    f"{prefix}.{name} is {part}: expected two whole numbers [first, last], first from 0 on, last larger"
                )


def path_problems(path: str | Path | None) -> Iterator[str]:
    """A problem if a path is empty, or below the home of nobody; None is no problem."""
    try:
        None if path is None else path_of(path)
    except ValueError as error:
        yield str(error)


class DataModule(pl.LightningDataModule, ABC):
    """Training and validation images, shared among processes and loaded in batches.

    Usable without a trainer too: call ``setup()``, then ask for loaders. Randomness is a function of seed, epoch and
    rank, and of the number of workers. A subclass names the class of its options and says what its images are.

    Args:
        positional: the first options of the class ``options_type``, in their order.
        options: the others, by name.

    Attributes:
        options: all of them.
        preparation: how the network wants its images, see `prepare_as`; its size: theirs, if they have one.
        repeats: how often each training image of an epoch comes, varied anew each time; see `EpochSampler`.
        views: fixed ones of each training image, of which an epoch has the next one, in batches `Viewed`; 0: images are
            varied anew each time.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.
    """

    options_type: ClassVar[type[DataOptions]]
    fewest: ClassVar[int] = 2  # training images of a batch: batch norm cannot take one
    options: Any  # an instance of options_type
    preparation: Preparation = IMAGENET
    repeats = 1
    views = 0
    num_classes: int
    class_names: list[str]
    train_set: Any  # a Dataset that has a length
    val_set: Any

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__()
        known = [field.name for field in fields(self.options_type)]
        if unknown := [f"{name!r}{did_you_mean(name, known)}" for name in options if name not in known]:
            raise TypeError(f"{type(self).__name__} has no option {'; and no option '.join(unknown)}")
        self.options = self.options_type(*positional, **options)
        if problems := list(self.options.problems("data")):
            raise ValueError("; ".join(problems))
        self.read = functools.partial(read_picture, white=self.options.white, max_pixels=self.options.max_pixels)

    @property
    def prepares(self) -> bool:
        """Whether images are normalised, so that it matters how a network wants them."""
        return True

    def prepare_as(self, preparation: Preparation) -> None:
        """Take how the network that is trained wants its images; else they are as ImageNet's usually are.

        Raises:
            ValueError: the images have been set up already.
        """
        if hasattr(self, "train_set"):
            raise ValueError("the images have been set up already: call prepare_as before setup and the loaders")
        self.preparation = preparation

    @property
    def code(self) -> str:
        """``package.module:function`` of the user's own that reading the images runs; empty if there is none."""
        return ""

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
        val = self._chosen(self._chosen(val, "val_part"), "val_limit")
        self.val_set = self._dataset(val, training=False)
        train = self._chosen(self._chosen(train, "train_part"), "train_limit", self.options.seed)
        self.train_set = self._dataset(train, training=True)

    def _chosen(self, images: Any, option: str, seed: int = 0) -> Any:
        """The images of a part [first, last], or as many as a limit, at random with groups in balance."""
        value: int | list[int] | None = getattr(self.options, option)
        if value is None:
            return images
        groups = self._groups(images)
        first, last = (0, value) if isinstance(value, int) else value
        if last > len(groups):
            raise ValueError(f"data.{option} is {value}, but there are only {len(groups)} images")
        return images.subset(balanced_subset(groups, last - first, seed, first))

    def check_shares(self, world: int) -> None:
        """Raise a ValueError unless there are enough images for so many processes."""
        self.setup()
        if -(-len(self.train_set) // world) < self.fewest:
            images, processes = counted(len(self.train_set), "training image"), counted(world, "process", "processes")
            raise ValueError(f"{images} for {processes}: each needs at least {self.fewest}")
        strided_batches(len(self.val_set), self.options.batch_size, 0, world)

    def train_dataloader(self) -> BatchLoader:
        """This rank's share of the training images, shuffled anew in each epoch that its sampler is told of."""
        self.setup()
        rank, world = rank_and_world()
        self.check_shares(world)
        generator = Generator()
        sampler = EpochSampler(self.train_set, self.options.seed, generator, rank, world, self.repeats, self.views)
        # Batch norm cannot take a batch of one image, which the last one might be, so an incomplete batch is
        # dropped; in the next epoch other images fall into it. If all images are less than a batch, they are one.
        drop_last = len(sampler) >= self.options.batch_size
        return self._loader(
            self._varied(self.train_set),
            generator,
            batch_size=self.options.batch_size,
            sampler=sampler,
            drop_last=drop_last,
        )

    def _varied(self, images: Any) -> Any:
        """Training images, in their fixed views where they have some."""
        return FixedViews(images, self.views) if self.views else images

    def views_dataloader(self, numbers: Sequence[int]) -> BatchLoader:
        """Fixed views of training images, by their numbers; see `FixedViews`."""
        batching = {"batch_size": self.options.batch_size, "sampler": ShareSampler(numbers)}
        return self._loader(self._varied(self.train_set), Generator(), **batching)

    def val_dataloader(self) -> BatchLoader:
        """This rank's share of the validation images: over all ranks, each image once."""
        self.setup()
        return self._each_once(self.val_set)

    def these_dataloader(self, indices: Sequence[int]) -> BatchLoader:
        """These validation images in this order, all of them in this process."""
        self.setup()
        size = self.options.batch_size
        batches = [list(indices[first : first + size]) for first in range(0, len(indices), size)]
        return self._loader(self.val_set, Generator(), batch_sampler=batches)

    def _each_once(self, dataset: Any) -> BatchLoader:
        """This rank's share of images in their order: over all ranks, each image once."""
        batches = strided_batches(len(dataset), self.options.batch_size, *rank_and_world())
        # Nothing is random here, but without a generator of its own the loader would draw from the global one.
        return self._loader(dataset, Generator(), batch_sampler=batches)

    def refresh_dataloader(self, max_images: int, epoch: int) -> BatchLoader:
        """This rank's share of up to ``max_images`` random training images, to solve the matching from.

        Which images depends on seed and epoch only, and they are varied as in training, as the paper draws them from
        the training loader, or as `refresh_set` has them. If there are fewer images than ranks, the loader of some ranks
        is empty.
        """
        self.setup()
        if max_images < 1:
            raise ValueError(f"max_images is {max_images}: a refresh of the matching needs at least one image")
        rank, world = rank_and_world()
        choice = Generator().manual_seed(mix_seed("refresh", self.options.seed, epoch))
        chosen = torch.randperm(len(self.refresh_set), generator=choice)[:max_images]
        generator = Generator().manual_seed(mix_seed("refresh workers", self.options.seed, epoch, rank))
        first = first_of_view(epoch, self.views, len(self.refresh_set)) if self.views else 0
        sampler = ShareSampler((first + chosen[rank::world]).tolist())
        images = self._varied(self.refresh_set)
        return self._loader(images, generator, batch_size=self.options.batch_size, sampler=sampler)

    @property
    def refresh_set(self) -> Any:
        """The training images as a refresh sees them."""
        return self.train_set

    def _loader(self, dataset: Dataset[Any], generator: Generator, **batching: Any) -> BatchLoader:
        # Workers are not kept from epoch to epoch (persistent_workers): they could not be seeded anew.
        return BatchLoader(
            dataset,
            num_workers=self.options.workers,
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

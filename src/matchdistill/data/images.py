"""The data module of the classification task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Generator
from torch.utils.data import Dataset

from matchdistill.data.cub import find_cub, read_cub
from matchdistill.data.folder import FolderDataset, ImageFiles, find_images, image_transform
from matchdistill.data.imagenet import extract_imagenet
from matchdistill.data.loading import (
    BatchLoader,
    EpochSampler,
    ShareSampler,
    as_it_is,
    balanced_subset,
    mix_seed,
    strided_batches,
)
from matchdistill.data.tensors import (
    FASHION_CLASSES,
    GrayImages,
    TensorDataset,
    find_fashion_mnist,
    load_digits,
    load_fashion_mnist,
)
from matchdistill.messages import did_you_mean
from matchdistill.refresh import rank_and_world

Images = GrayImages | ImageFiles

IMAGE_SIZES = {"digits": 16, "fashion-mnist": 32, "folder": 224, "imagenet": 224, "cub200": 224}
ROOTS = {
    "folder": "the folder that holds train/ and val/",
    "imagenet": "the folder that holds train/ and val/, or the official archives",
    "cub200": "the folder CUB_200_2011, or its archive",
}


class ImageData(pl.LightningDataModule):
    """Images with labels, as three channels with ImageNet's mean and deviation, so that any network takes them.

    Usable without a trainer too: call ``setup()``, then ask for loaders. Randomness is a function of seed, epoch and
    rank, and of the number of workers.

    Args:
        name: ``digits`` (built in), ``fashion-mnist``, ``folder`` for ``ROOT/train/CLASS/*.jpg`` and
            ``ROOT/val/CLASS/*.jpg`` (or ``valid``, ``validation``), ``imagenet`` for the same or the official archives,
            ``cub200`` for CUB-200-2011. What is in archives is extracted beside them, once.
        root: the folder with the data; ``digits`` needs none.
        image_size: height and width in pixels; by default 16 for digits, 32 for fashion-mnist, 224 for the others.
        batch_size: images per step and process.
        workers: processes that load images; 0 loads in the training process.
        train_part: [first, last]: of the training images in a balanced random order that is the same for every
            ``seed``, those from ``first`` to before ``last``; ``train_limit`` chooses among them. For disjoint images
            of teacher, pre-training and student.
        val_part: likewise of the validation images. For disjoint images to choose settings by and to report.
        train_limit: use that many training images, a random choice by ``seed`` with equally many of each class.
        val_limit: use that many validation images, likewise but the same for every ``seed``.
        augment: whether training images are varied: shifted (digits), shifted and mirrored (fashion-mnist), cropped
            and mirrored (the others).
        skip_corrupt: leave out images that cannot be read, with a warning, instead of stopping.
        download: whether fashion-mnist may be downloaded into ``root``.
        seed: of the order, the choice by ``train_limit`` and the workers' augmentation.

    Attributes (after ``setup()``):
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        train_set: the training images.
        val_set: the validation images.

    Example:
        >>> data = ImageData(train_limit=300, batch_size=100)
        >>> data.setup()
        >>> [images.shape for images, labels in data.train_dataloader()]
        [torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16])]
    """

    num_classes: int
    class_names: list[str]
    train_set: TensorDataset | FolderDataset
    val_set: TensorDataset | FolderDataset

    def __init__(
        self,
        name: str = "digits",
        root: Path | None = None,
        image_size: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        train_part: list[int] | None = None,
        val_part: list[int] | None = None,
        train_limit: int | None = None,
        val_limit: int | None = None,
        augment: bool = True,
        skip_corrupt: bool = False,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        problems = []
        if name not in IMAGE_SIZES:
            problems.append(
                f"data.name is {name!r}: expected {', '.join(IMAGE_SIZES)}{did_you_mean(name, IMAGE_SIZES)}"
            )
        if name in ROOTS and root is None:
            problems.append(f"data.name is {name!r}: give {ROOTS[name]} as data.root")
        for argument, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("train_limit", train_limit, 1),
            ("val_limit", val_limit, 1),
        ):
            if value is not None and value < least:
                problems.append(f"data.{argument} is {value}: expected a whole number from {least} on")
        for argument, part in (("train_part", train_part), ("val_part", val_part)):
            if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
                problems.append(
                    f"data.{argument} is {part}: expected two whole numbers [first, last], first from 0 on, last larger"
                )
        if problems:
            raise ValueError("; ".join(problems))
        self.name: str = name
        self.root = None if root is None else Path(root).expanduser()
        self.image_size = image_size or IMAGE_SIZES[name]
        self.batch_size = batch_size
        self.workers = workers
        self.train_part = train_part
        self.val_part = val_part
        self.train_limit = train_limit
        self.val_limit = val_limit
        self.augment = augment
        self.skip_corrupt = skip_corrupt
        self.download = download
        self.seed = seed

    def prepare_data(self) -> None:
        """Download or extract, once per machine, what is to be downloaded or extracted."""
        self._located()

    def setup(self, stage: str | None = None) -> None:
        """Read the images or, where each is a file, their names. Further calls do nothing."""
        if hasattr(self, "train_set"):
            return
        train, val, self.class_names = self._read()
        self.num_classes = len(self.class_names)
        val = _chosen(_chosen(val, "val_part", self.val_part, 0), "val_limit", self.val_limit, 0)
        self.val_set = self._dataset(val, training=False)
        train = _chosen(_chosen(train, "train_part", self.train_part, 0), "train_limit", self.train_limit, self.seed)
        self.train_set = self._dataset(train, training=True)

    def _located(self) -> Path | None:
        """Where the data is, after it was brought there."""
        if self.name == "fashion-mnist":
            return find_fashion_mnist(self.root, self.download)
        extract = {"cub200": find_cub, "imagenet": extract_imagenet}.get(self.name)
        return extract(self.root) if extract and self.root else self.root

    def _read(self) -> tuple[Images, Images, list[str]]:
        """Training images, validation images and class names."""
        if self.name == "digits":
            return *load_digits(), [str(digit) for digit in range(10)]
        folder = self._located()
        assert folder is not None
        if self.name == "fashion-mnist":
            return *load_fashion_mnist(folder), FASHION_CLASSES.copy()
        return read_cub(folder) if self.name == "cub200" else find_images(folder)

    def _dataset(self, data: Images, training: bool) -> TensorDataset | FolderDataset:
        augment = training and self.augment
        if isinstance(data, ImageFiles):
            # At least two: batch norm cannot take a training batch of one image.
            fewest = 2 if training else 1
            return FolderDataset(data, image_transform(self.image_size, augment), self.skip_corrupt, fewest)
        # An eighth: 1 px of the original digits, 4 px of Fashion-MNIST at 32 px. Digits must not be mirrored.
        shift = self.image_size // 8 if augment else 0
        return TensorDataset(data.resized(self.image_size), shift, flip=augment and self.name == "fashion-mnist")

    def train_dataloader(self) -> BatchLoader:
        """This rank's share of the training images, shuffled anew in each epoch that its sampler is told of."""
        self.setup()
        rank, world = rank_and_world()
        generator = Generator()
        sampler = EpochSampler(self.train_set, self.seed, generator, rank, world)
        if len(sampler) < 2:
            raise ValueError(
                f"{len(self.train_set)} training images for {world} processes: each needs two at least for batch norm"
            )
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
        return [path for images in sets if isinstance(images, FolderDataset) for path in images.corrupt_paths]


def _chosen(data: Images, argument: str, value: int | Sequence[int] | None, seed: int) -> Images:
    """So many images, or those of a part [first, last], at random with classes in balance."""
    if value is None:
        return data
    first, last = (0, value) if isinstance(value, int) else value
    if last > len(data.labels):
        raise ValueError(f"data.{argument} is {value}, but there are only {len(data.labels)} images")
    return data.subset(balanced_subset(data.labels, last - first, seed, first))

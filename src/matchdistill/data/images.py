"""The data module of the classification task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Generator
from torch.utils.data import Dataset

from matchdistill.data.folder import FolderDataset, ImageFiles, find_images, image_transform
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

Images = TypeVar("Images", GrayImages, ImageFiles)

IMAGE_SIZES = {"digits": 16, "fashion-mnist": 32, "folder": 224}


class ImageData(pl.LightningDataModule):
    """Images with labels, as three channels with ImageNet's mean and deviation, so that any network takes them.

    Usable without a trainer too: call ``setup()``, then ask for loaders. Randomness is a function of seed, epoch and
    rank, and of the number of workers.

    Args:
        name: ``digits`` (built in), ``fashion-mnist``, or ``folder`` for ``ROOT/train/CLASS/*.jpg`` and
            ``ROOT/val/CLASS/*.jpg`` (or ``valid``).
        root: the folder with the data; ``digits`` needs none.
        image_size: height and width in pixels; by default 16 for digits, 32 for fashion-mnist, 224 for folder.
        batch_size: images per step and process.
        workers: processes that load images; 0 loads in the training process.
        train_limit: use that many training images, a random choice by ``seed`` with equally many of each class.
        val_limit: use that many validation images, likewise but the same for every ``seed``.
        augment: whether training images are varied: shifted (digits), shifted and mirrored (fashion-mnist), cropped
            and mirrored (folder).
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
        if name == "folder" and root is None:
            problems.append("data.name is 'folder': give the folder that holds train/ and val/ as data.root")
        for argument, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("train_limit", train_limit, 1),
            ("val_limit", val_limit, 1),
        ):
            if value is not None and value < least:
                problems.append(f"data.{argument} is {value}: expected a whole number from {least} on")
        if problems:
            raise ValueError("; ".join(problems))
        self.name: str = name
        self.root = None if root is None else Path(root).expanduser()
        self.image_size = image_size or IMAGE_SIZES[name]
        self.batch_size = batch_size
        self.workers = workers
        self.train_limit = train_limit
        self.val_limit = val_limit
        self.augment = augment
        self.skip_corrupt = skip_corrupt
        self.download = download
        self.seed = seed

    def prepare_data(self) -> None:
        """Download, once per machine, what is to be downloaded."""
        if self.name == "fashion-mnist":
            find_fashion_mnist(self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Read the images or, for folders, their names. Further calls do nothing."""
        if hasattr(self, "train_set"):
            return
        if self.name == "folder":
            assert self.root is not None
            train_files, val_files, self.class_names = find_images(self.root)
            train_files = _limited(train_files, self.train_limit, self.seed, "train")
            val_files = _limited(val_files, self.val_limit, 0, "val")
            # At least two: batch norm cannot take a training batch of one image.
            self.train_set = FolderDataset(
                train_files, image_transform(self.image_size, self.augment), self.skip_corrupt, fewest=2
            )
            self.val_set = FolderDataset(val_files, image_transform(self.image_size, False), self.skip_corrupt)
        else:
            if self.name == "digits":
                train, val = load_digits()
                self.class_names = [str(digit) for digit in range(10)]
            else:
                train, val = load_fashion_mnist(find_fashion_mnist(self.root, self.download))
                self.class_names = FASHION_CLASSES.copy()
            train = _limited(train, self.train_limit, self.seed, "train").resized(self.image_size)
            val = _limited(val, self.val_limit, 0, "val").resized(self.image_size)
            # An eighth: 1 px of the original digits, 4 px of Fashion-MNIST at 32 px. Digits must not be mirrored.
            shift = self.image_size // 8 if self.augment else 0
            self.train_set = TensorDataset(train, shift, flip=self.augment and self.name == "fashion-mnist")
            self.val_set = TensorDataset(val)
        self.num_classes = len(self.class_names)

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


def _limited(data: Images, limit: int | None, seed: int, split: str) -> Images:
    if limit is None:
        return data
    if limit > len(data.labels):
        raise ValueError(f"data.{split}_limit is {limit}, but there are only {len(data.labels)} images")
    return data.subset(balanced_subset(data.labels, limit, seed))

"""The data module of the classification task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from matchdistill.data.cub import find_cub, read_cub
from matchdistill.data.folder import FolderDataset, ImageFiles, find_images, image_transform, uncropped
from matchdistill.data.imagenet import extract_imagenet
from matchdistill.data.module import DataModule
from matchdistill.data.tensors import (
    FASHION_CLASSES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    GrayImages,
    TensorDataset,
    find_fashion_mnist,
    load_digits,
    load_fashion_mnist,
)
from matchdistill.files import path_of
from matchdistill.messages import did_you_mean, whole

Images = GrayImages | ImageFiles

IMAGE_SIZES = {"digits": 16, "fashion-mnist": 32, "folder": 224, "imagenet": 224, "cub200": 224}
LARGEST_IMAGE = 8192  # pixels of its sides: of larger ones a batch alone fills the memory
ROOTS = {
    "folder": "the folder that holds train/ and val/",
    "imagenet": "the folder that holds train/ and val/, or the official archives",
    "cub200": "the folder CUB_200_2011, or its archive",
}


def preparation(name: str, image_size: int) -> dict[str, Any]:
    """How validation images of a data set are prepared, in timm's words; small gray ones are resized whole.

    Examples:
        >>> prepared = preparation("folder", 224)
        >>> prepared["input_size"], prepared["crop_pct"]
        ([3, 224, 224], 0.875)
    """
    # Rounded down: timm rounds the quotient down, which gives the same pixels then.
    share = 1.0 if name in ("digits", "fashion-mnist") else math.floor(1e4 * image_size / uncropped(image_size)) / 1e4
    return {
        "input_size": [3, image_size, image_size],
        "interpolation": "bilinear",
        "crop_pct": share,
        "crop_mode": "center",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


class ImageData(DataModule):
    """Images with labels, as three channels with ImageNet's mean and deviation, so that any network takes them.

    Usable without a trainer too: call ``setup()``, which sets the attributes, then ask for loaders. Randomness is a
    function of seed, epoch and rank, and of the number of workers.

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
        white: the value that is white in images of more than 8 bits; null: 65535, and of floating-point numbers 1.
        max_pixels: the most pixels of an image; null: 179 million, so that no small damaged file fills the memory.
        download: whether fashion-mnist may be downloaded into ``root``.
        seed: of the order, the choice by ``train_limit`` and the workers' augmentation.

    Attributes:
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        train_set: the training images.
        val_set: the validation images.

    Examples:
        >>> data = ImageData(train_limit=300, batch_size=100)
        >>> data.setup()
        >>> [images.shape for images, labels in data.train_dataloader()]
        [torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16])]
    """

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
        white: float | None = None,
        max_pixels: int | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        problems = []
        if name not in IMAGE_SIZES:
            problems.append(
                f"data.name is {name!r}: expected {', '.join(IMAGE_SIZES)}{did_you_mean(name, IMAGE_SIZES)}"
            )
        if name in ROOTS and root is None:
            problems.append(f"data.name is {name!r}: give {ROOTS[name]} as data.root")
        problems += whole("data.image_size", image_size, 1, LARGEST_IMAGE)
        super().__init__(
            problems,
            batch_size,
            workers,
            train_part,
            val_part,
            train_limit,
            val_limit,
            skip_corrupt,
            white,
            max_pixels,
            seed,
        )
        self.name: str = name
        self.root = None if root is None else path_of(root)
        self.image_size = image_size or IMAGE_SIZES[name]
        self.augment = augment
        self.download = download

    def prepare_data(self) -> None:
        """Download or extract, once per machine, what is to be downloaded or extracted."""
        self._located()

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

    def _groups(self, images: Images) -> Tensor:
        return images.labels

    def _dataset(self, images: Images, training: bool) -> TensorDataset | FolderDataset:
        augment = training and self.augment
        if isinstance(images, ImageFiles):
            fewest = self.fewest if training else 1
            transform = image_transform(self.image_size, augment)
            return FolderDataset(images, transform, self.skip_corrupt, fewest, self.read)
        # An eighth: 1 px of the original digits, 4 px of Fashion-MNIST at 32 px. Digits must not be mirrored.
        shift = self.image_size // 8 if augment else 0
        return TensorDataset(images.resized(self.image_size), shift, flip=augment and self.name == "fashion-mnist")

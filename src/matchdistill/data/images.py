"""The data module of the classification task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from matchdistill.data.augmenting import PLAIN, AugmentingOptions, variation
from matchdistill.data.cub import find_cub, read_cub
from matchdistill.data.folder import FolderDataset, ImageFiles, find_images, image_transform, uncropped
from matchdistill.data.imagenet import extract_imagenet
from matchdistill.data.module import DataModule, path_problems
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
Split = tuple[Images, Images, list[str]]  # training images, validation images, names of the classes
Place = Any  # the path of a data set; None where it is part of a library

LARGEST_IMAGE = 8192  # pixels of its sides: of larger ones a batch alone fills the memory


def _as_given(root: Path | None, download: bool) -> Place:
    return root


@dataclass(frozen=True)
class ImageSet:
    """A data set that `ImageData` knows by name.

    Attributes:
        size: height and width in pixels that its images have if nothing else is said.
        read: from where `locate` has found it to training images, validation images and names of the classes.
        root: what the user has to give as `data.root`; empty: the set can do without.
        locate: finds it, after downloading or extracting what has to be: (root, whether it may be downloaded) -> place.
        small: whether `read` gives `GrayImages`, which are kept in memory and resized whole, instead of `ImageFiles`, which
            are cropped.
        flip: whether training images are mirrored if they are varied.
    """

    size: int
    read: Callable[[Place], Split]
    root: str = ""
    locate: Callable[[Place, bool], Place] = _as_given
    small: bool = False
    flip: bool = True


def _read_digits(_: Place) -> Split:
    return *load_digits(), [str(digit) for digit in range(10)]


def _read_fashion_mnist(folder: Place) -> Split:
    return *load_fashion_mnist(folder), FASHION_CLASSES.copy()


IMAGE_SETS = {
    "digits": ImageSet(16, _read_digits, small=True, flip=False),
    "fashion-mnist": ImageSet(32, _read_fashion_mnist, locate=find_fashion_mnist, small=True),
    "folder": ImageSet(224, find_images, "the folder that holds train/ and val/"),
    "imagenet": ImageSet(
        224,
        find_images,
        "the folder that holds train/ and val/, or the official archives",
        locate=lambda root, _: extract_imagenet(root),
    ),
    "cub200": ImageSet(224, read_cub, "the folder CUB_200_2011, or its archive", locate=lambda root, _: find_cub(root)),
}


def preparation(name: str, image_size: int) -> dict[str, Any]:
    """How validation images of a data set are prepared, in timm's words; small gray ones are resized whole.

    Examples:
        >>> prepared = preparation("folder", 224)
        >>> prepared["input_size"], prepared["crop_pct"]
        ([3, 224, 224], 0.875)
    """
    # Rounded down: timm rounds the quotient down, which gives the same pixels then.
    small = name in IMAGE_SETS and IMAGE_SETS[name].small
    share = 1.0 if small else math.floor(1e4 * image_size / uncropped(image_size)) / 1e4
    return {
        "input_size": [3, image_size, image_size],
        "interpolation": "bilinear",
        "crop_pct": share,
        "crop_mode": "center",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


@dataclass
class ImageOptions(AugmentingOptions):
    """Images with labels, as three channels with ImageNet's mean and deviation, so that any network takes them.

    `ImageData` takes these options and the ones of `AugmentingOptions` and `DataOptions`.

    Args:
        name: ``digits`` (built in), ``fashion-mnist``, ``folder`` for ``ROOT/train/CLASS/*.jpg`` and
            ``ROOT/val/CLASS/*.jpg`` (or ``valid``, ``validation``), ``imagenet`` for the same or the official archives,
            ``cub200`` for CUB-200-2011. What is in archives is extracted beside them, once.
        root: the folder with the data; ``digits`` needs none.
        image_size: height and width in pixels; by default 16 for digits, 32 for fashion-mnist, 224 for the others.
        augment: whether training images are varied at all: shifted (digits), shifted and mirrored (fashion-mnist), cropped
            and mirrored (the others), and as the other options say.
        download: whether fashion-mnist may be downloaded into ``root``.
        train_part: [first, last]: of the training images in a balanced random order that is the same for every
            ``seed``, those from ``first`` to before ``last``; ``train_limit`` chooses among them. For disjoint images
            of teacher, pre-training and student.
        train_limit: use that many training images, a random choice by ``seed`` with equally many of each class.
    """

    name: str = "digits"
    root: Path | None = None
    image_size: int | None = None
    augment: bool = True
    download: bool = False

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        if self.name not in IMAGE_SETS:
            yield (
                f"{prefix}.name is {self.name!r}: expected {', '.join(IMAGE_SETS)}{did_you_mean(self.name, IMAGE_SETS)}"
            )
        elif self.root is None and (needed := IMAGE_SETS[self.name].root):
            yield f"{prefix}.name is {self.name!r}: give {needed} as {prefix}.root"
        elif IMAGE_SETS[self.name].small and self.crop_scale is not None:
            yield f"{prefix}.crop_scale is of sets that are cropped: leave it out with {self.name}, whose images are shifted"
        yield from whole(f"{prefix}.image_size", self.image_size, 1, LARGEST_IMAGE)
        yield from super().problems(prefix)
        yield from path_problems(self.root)


class ImageData(DataModule):
    """Images with labels, as three channels with ImageNet's mean and deviation, so that any network takes them.

    Usable without a trainer too: call ``setup()``, which sets the attributes, then ask for loaders. Randomness is a
    function of seed, epoch and rank, and of the number of workers.

    Args:
        positional: the first options of `ImageOptions`, in their order.
        options: the others, by name.

    Attributes:
        options: all of them, as `ImageOptions`.
        image_size: height and width of the images in pixels.
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        train_set: the training images.
        train_labels: of all of them (N,).
        val_set: the validation images.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.

    Examples:
        >>> data = ImageData(train_limit=300, batch_size=100)
        >>> data.setup()
        >>> [images.shape for images, labels in data.train_dataloader()]
        [torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16])]
    """

    options_type = ImageOptions
    options: ImageOptions
    train_set: TensorDataset | FolderDataset
    train_labels: Tensor
    val_set: TensorDataset | FolderDataset

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, **options)
        self.root = None if self.options.root is None else path_of(self.options.root)
        self.image_size = self.options.image_size or self._set.size

    @property
    def _set(self) -> ImageSet:  # not kept: a data module travels to other processes, and functions may not
        return IMAGE_SETS[self.options.name]

    def prepare_data(self) -> None:
        """Download or extract, once per machine, what is to be downloaded or extracted."""
        self._set.locate(self.root, self.options.download)

    def _read(self) -> Split:
        return self._set.read(self._set.locate(self.root, self.options.download))

    def _groups(self, images: Images) -> Tensor:
        return images.labels

    def _dataset(self, images: Images, training: bool) -> TensorDataset | FolderDataset:
        if training:
            self.train_labels = images.labels
        augment = training and self.options.augment
        flip = augment and self._set.flip
        varied = variation(self.options) if augment else PLAIN
        if isinstance(images, ImageFiles):
            fewest = self.fewest if training else 1
            transform = image_transform(self.image_size, augment, flip, varied)
            return FolderDataset(images, transform, self.options.skip_corrupt, fewest, self.read)
        # An eighth: 1 px of the original digits, 4 px of Fashion-MNIST at 32 px. Digits must not be mirrored.
        shift = self.image_size // 8 if augment else 0
        return TensorDataset(images.resized(self.image_size), shift, flip, varied)

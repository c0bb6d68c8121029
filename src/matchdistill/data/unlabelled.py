"""The data module of tasks that learn without labels.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from matchdistill.data.folder import (
    FolderDataset,
    ImageFiles,
    class_folders,
    find_images,
    no_images,
    scan,
    some,
    val_folder,
)
from matchdistill.data.images import ImageData, ImageOptions, Images, ImageSet, image_set
from matchdistill.data.loading import BatchLoader, balanced_subset
from matchdistill.data.pictures import IMAGE_SUFFIXES
from matchdistill.data.tensors import TensorDataset
from matchdistill.messages import whole

Found = tuple[ImageFiles, ImageFiles | None, list[str]]


def find_tree(root: Path) -> Found:
    """Training images, validation images and class names of any tree of images.

    Folders ``train`` and ``val`` are used as such where they exist. There are classes only where both have the same class
    folders, two or more, and nothing else. Otherwise there are no class names, and all labels are 0.

    Args:
        root: the folder.

    Raises:
        ValueError: in one line, that it is missing, unreadable or has no images.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} {'is a file' if root.exists() else 'does not exist'}")
    train_root, val_root = root / "train", val_folder(root)
    if train_root.is_dir() and val_root.is_dir() and _same_classes(train_root, val_root):
        return find_images(root)
    val = _images_below(val_root) if val_root.is_dir() else None
    if train_root.is_dir():
        return _images_below(train_root), val, []
    return _images_below(root, None if val is None else val_root), val, []


def _same_classes(train_root: Path, val_root: Path) -> bool:
    """Whether two folders hold class folders by the same names; a warning tells where they differ."""
    try:
        train, val = class_folders(train_root), class_folders(val_root)
    except ValueError:  # no folders in one of them; what cannot be read is told when its images are looked for
        return False
    if any(path.suffix.lower() in IMAGE_SUFFIXES for folder in (train_root, val_root) for path in folder.iterdir()):
        return False
    if strange := val.keys() - train.keys():
        warnings.warn(
            f"the folders in {train_root} and {val_root} are taken for no classes, as some are only in the latter "
            f"({some(strange)}): nothing is measured by labels",
            stacklevel=3,
        )
    return not strange and len(train) > 1  # one folder says nothing


def _images_below(folder: Path, left_out: Path | None = None) -> ImageFiles:
    """All images below a folder but the ones below another, sorted by their paths.

    Raises:
        ValueError: there are none.
    """
    paths = [path for path in scan([folder])[0] if left_out is None or not Path(path).is_relative_to(left_out)]
    if not paths:
        raise no_images(f"image folder {folder}")
    return ImageFiles(paths, torch.zeros(len(paths), dtype=torch.int64))


TREE = ImageSet(224, find_tree, "the folder with the images")


@dataclass
class UnlabelledOptions(ImageOptions):
    """Images without labels, or with labels that serve to measure alone.

    `UnlabelledData` takes these options and the ones of `ImageOptions`, `AugmentingOptions` and `DataOptions`.

    Args:
        name: ``folder`` for a folder with images anywhere in it. Its folders ``train`` and ``val`` (or ``valid``,
            ``validation``) are used as such where they exist; if both have the same class folders, these are labels to
            measure by. Or any set with labels, which then serve to measure alone: ``digits`` (built in),
            ``fashion-mnist``, ``imagenet``, ``cub200``, ``csv``, ``datasets``, ``webdataset`` or
            ``package.module:function``, as for classification.
        root: the folder or file with the data; ``digits`` needs none.
        val_share: where there are no validation images, this share of the training images is taken out for them, of each
            class if there are classes; the choice is the same for every ``seed``.
        bank_limit: the most training images that measuring by labels looks at, a random choice by ``seed`` with equally
            many of each class; null: all.
    """

    bank_limit: int | None = 10_000

    @property
    def image_set(self) -> ImageSet | None:
        """The set of the name; None: there is none."""
        return TREE if self.name == "folder" else image_set(self.name)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        yield from whole(f"{prefix}.bank_limit", self.bank_limit, 1)
        yield from super().problems(prefix)


class UnlabelledData(ImageData):
    """Images without labels, or with labels that serve to measure alone.

    Images come as `ImageData` gives them: in batches of images (N, 3, H, W) and labels (N,). Without labels there are no
    ``class_names``, and all labels are 0.

    Args:
        positional: the first options of `UnlabelledOptions`, in their order.
        options: the others, by name.

    Attributes:
        bank_set: training images, prepared as the validation images are, to measure by labels.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.

    Examples:
        >>> data = UnlabelledData(train_limit=300, bank_limit=50)
        >>> data.setup()
        >>> len(data.train_set), len(data.bank_set), data.labelled
        (300, 50, True)
    """

    options_type: ClassVar[type[UnlabelledOptions]] = UnlabelledOptions
    options: UnlabelledOptions
    bank_set: TensorDataset | FolderDataset

    @property
    def labelled(self) -> bool:
        """Whether the labels say anything; known after ``setup()``."""
        return bool(self.class_names)

    def _dataset(self, images: Images, training: bool) -> Any:
        if training:
            count = len(images.labels)
            limit = min(self.options.bank_limit or count, count)
            chosen = images.subset(balanced_subset(images.labels, limit, self.options.seed))
            self.bank_set = super()._dataset(chosen, training=False)
        return super()._dataset(images, training)

    def bank_dataloader(self) -> BatchLoader:
        """This rank's share of the images of ``bank_set``: over all ranks, each image once."""
        self.setup()
        return self._each_once(self.bank_set)

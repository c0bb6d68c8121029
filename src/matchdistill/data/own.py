"""Images of the user's own data sets: a function gives them, as pairs of an image and a label.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from matchdistill.data.classes import in_order
from matchdistill.data.folder import FolderDataset, ImageFiles
from matchdistill.data.pictures import Picture
from matchdistill.lookup import own_function
from matchdistill.messages import cause

LABELS = ("targets", "labels")  # attributes of data sets that have the labels of all items


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a user's data set, as `Stored` has it.

    Attributes:
        dataset: a map-style data set whose items are (image, label).
        index: of the item.
        source: what messages call the data set.
    """

    dataset: Any
    index: int
    source: str

    def __str__(self) -> str:
        return f"{self.index} of {self.source}"

    def pair(self) -> tuple[Image.Image | Tensor, Any]:
        """The image and its label.

        Raises:
            ValueError: the item is no pair of an image and something else.
        """
        item = self.dataset[self.index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"item {self} is a {type(item).__name__}: expected a pair (image, label)")
        if not isinstance(item[0], Image.Image | Tensor):
            raise ValueError(f"item {self} has a {type(item[0]).__name__}: expected a PIL image or a tensor")
        return item[0], item[1]

    def open(self) -> Image.Image | Tensor:
        """The image."""
        return self.pair()[0]


@dataclass(frozen=True)
class OwnSet:
    """A function of the user's own that gives images.

    Attributes:
        name: ``package.module:function``.
        options: its arguments.
        several: whether labels are vectors with a 1 for each class of an image, and a 0 for each other one.
    """

    name: str
    options: Mapping[str, Any]
    several: bool = False

    def read(self) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
        """Training images, validation images and class names.

        Raises:
            ValueError: in one line, why the function cannot be called, or what is wrong with what it returns.
        """
        found = self._called()
        if isinstance(found, pl.LightningDataModule):
            train, val, class_names = self._of_module(found)
        elif isinstance(found, tuple | list) and len(found) == 3:
            train, val, class_names = found
        else:
            raise self._refused(
                f"it returned a {type(found).__name__}: expected training set, validation set (or None) and class names, or "
                "a LightningDataModule"
            )
        if isinstance(class_names, str) or not isinstance(class_names, Sequence) or not class_names:
            raise self._refused(f"it returned {class_names!r} as the names of the classes: expected a list of names")
        names = [str(name) for name in class_names]
        if len(set(names)) < len(names):
            raise self._refused(f"it returned a class name twice, {next(n for n in names if names.count(n) > 1)!r}")
        train_files = self._images(train, "training", len(names))
        return train_files, None if val is None else self._images(val, "validation", len(names)), names

    def _called(self) -> Any:
        function = own_function(self.name, "data.name")
        try:
            inspect.signature(function).bind(**self.options)
        except (TypeError, ValueError) as error:
            raise self._refused(f"it cannot be called with data.options ({cause(error)})") from error
        try:
            return function(**self.options)
        except Exception as error:  # user code can fail in every way
            raise self._refused(f"it fails with {cause(error)}") from error

    def _of_module(self, module: pl.LightningDataModule) -> tuple[Any, Any, Any]:
        """Training set, validation set and class names of a data module, whose loaders are not used."""
        try:
            module.prepare_data()
            module.setup("fit")
            train = getattr(module.train_dataloader(), "dataset", None)
            val = getattr(module.val_dataloader(), "dataset", None) if _overrides(module, "val_dataloader") else None
        except Exception as error:  # user code can fail in every way
            raise self._refused(f"its data module fails with {cause(error)}") from error
        owners = [(owner, name) for owner in (module, train) for name in ("class_names", "classes")]
        if class_names := next((found for owner, name in owners if (found := getattr(owner, name, None))), None):
            return train, val, list(class_names)
        if train is None:
            raise self._refused("its data module has no training loader with a data set")
        if self.several:
            raise self._refused("its data module names no classes: give it an attribute class_names")
        labels = [self._label(label, item, None) for item, label in self._labels(train, "training")]
        return train, val, [str(number) for number in range(max(labels, default=-1) + 1)]

    def _images(self, dataset: Any, split: str, classes: int) -> ImageFiles:
        pairs = self._labels(dataset, split)
        if self.several:
            return ImageFiles(
                [item for item, _ in pairs], torch.stack([self._vector(*pair, classes) for pair in pairs])
            )
        return in_order((item, self._label(label, item, classes)) for item, label in pairs)

    def _labels(self, dataset: Any, split: str) -> list[tuple[Item, Any]]:
        """The items of a data set with their labels, which its attributes have, or else its items, which are then read."""
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise self._refused(
                f"its {split} set is a {type(dataset).__name__}: expected a Dataset with a length and items by number"
            )
        source = f"the {split} set of {self.name}"
        items = [Item(dataset, index, source) for index in range(len(dataset))]
        if not items:
            raise self._refused(f"its {split} set has no images")
        known: Any = next((found for name in LABELS if _fits(found := getattr(dataset, name, None), len(items))), None)
        try:
            items[0].pair()
            return [(item, item.pair()[1] if known is None else known[item.index]) for item in items]
        except Exception as error:  # user code can fail in every way
            raise self._refused(f"its {split} set cannot be read ({cause(error)})") from error

    def _label(self, label: Any, item: Item, classes: int | None) -> int:
        try:
            number = int(label.item() if hasattr(label, "item") else label)
            good = number == label and number >= 0 and (classes is None or number < classes)
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good:
            expected = "a whole number from 0 on" if classes is None else f"a whole number from 0 to {classes - 1}"
            raise self._refused(f"item {item} has the label {label!r}: expected {expected}")
        return number

    def _vector(self, item: Item, label: Any, classes: int) -> Tensor:
        try:
            vector = torch.as_tensor(label)
            good = tuple(vector.shape) == (classes,) and bool(((vector == 0) | (vector == 1)).all())
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good:
            raise self._refused(f"item {item} has the label {label!r}: expected {classes} numbers, each 0 or 1")
        return vector.to(torch.uint8)

    def _refused(self, problem: str) -> ValueError:
        return ValueError(f"data.name {self.name!r}: {problem}")


def _overrides(module: pl.LightningDataModule, method: str) -> bool:
    return getattr(type(module), method) is not getattr(pl.LightningDataModule, method)


def _fits(labels: Any, length: int) -> bool:
    return isinstance(labels, Sized) and hasattr(labels, "__getitem__") and len(labels) == length


class PreparedDataset(FolderDataset):
    """Tensors of a user's data set, which go to the network as they are.

    Args:
        images: the items.
        size: height and width that they must have.
        skip_corrupt: leave out items that cannot be read.
        fewest: how many images a batch needs.
    """

    def __init__(self, images: ImageFiles, size: int, skip_corrupt: bool, fewest: int = 1) -> None:
        self.shape = (3, size, size)
        super().__init__(images, self._taken, skip_corrupt, fewest, _prepared)

    def _taken(self, image: Any) -> Tensor:
        if tuple(image.shape) != self.shape or not image.is_floating_point():
            raise ValueError(
                f"data.prepared: expected float tensors {self.shape}, got {image.dtype} {tuple(image.shape)}: give their "
                "height and width as data.image_size"
            )
        return torch.as_tensor(image, dtype=torch.float32)


def _prepared(place: Any) -> Picture:
    """A tensor in the place of a picture."""
    image = place.open()
    if not isinstance(image, Tensor):
        raise ValueError(f"data.prepared: expected a tensor, got a {type(image).__name__}")
    return Picture(cast(Any, image))

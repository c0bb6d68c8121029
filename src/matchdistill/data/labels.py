"""The data module of images with any number of classes each.

Axes: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from matchdistill.data.images import IMAGE_SETS, OWN, ImageData, ImageOptions, Images, ImageSet
from matchdistill.data.tables import USUAL_SEPARATOR
from matchdistill.messages import did_you_mean


def _several(chosen: ImageSet, **changes: Any) -> ImageSet:
    """A set whose place is told to read several classes an image, where "separator" is that of the options."""

    def locate(root: Path | None, options: ImageOptions) -> Any:
        separator = {"separator": cast("LabelsOptions", options).label_separator} if "separator" in changes else {}
        return dataclasses.replace(chosen.locate(root, options), **{**changes, **separator})

    return dataclasses.replace(chosen, locate=locate)


LABEL_SETS = {
    "csv": _several(IMAGE_SETS["csv"], separator=""),
    "datasets": _several(IMAGE_SETS["datasets"], several=True),
}
OWN_LABELS = _several(OWN, several=True)


@dataclass
class LabelsOptions(ImageOptions):
    """Images with any number of classes each; of one with none, that it has none of the classes is learned.

    `LabelsData` takes these options and the ones of `ImageOptions`, `AugmentingOptions` and `DataOptions`.

    Args:
        name: ``csv`` for a table of paths and labels in ``.csv``, ``.tsv`` or ``.parquet``; ``datasets`` for a data set of
            Hugging Face with a column of lists of classes; ``package.module:function`` for a function of your own, whose
            items have a vector with a 1 for each class of the image and a 0 for each other one.
        root: the file or folder with the data.
        augment: whether training images are varied at all: cropped and mirrored, and as the other options say.
        val_root: of csv the file with the validation images, where ``root`` has the training images alone.
        val_share: where there are no validation images, this share of the training images is taken out for them; the choice
            is the same for every ``seed``.
        train_part: [first, last]: of the training images in a random order that is the same for every ``seed``, those from
            ``first`` to before ``last``; ``train_limit`` chooses among them.
        train_limit: use that many training images, a random choice by ``seed``.
        label_separator: between the names of the classes in a table.
    """

    name: str = "csv"
    label_separator: str = USUAL_SEPARATOR

    @property
    def image_set(self) -> ImageSet | None:
        """The set of the name; None: there is none."""
        module, _, function = self.name.partition(":")
        return LABEL_SETS.get(self.name) or (OWN_LABELS if module and function else None)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        if not self.label_separator:
            yield f"{prefix}.label_separator is empty: give what stands between the names of an image's classes"
        elif self.label_separator != USUAL_SEPARATOR and self.name != "csv" and self.image_set is not None:
            yield f"{prefix}.label_separator is for csv, not for {self.name!r}: leave it out"
        if self.image_set is None:
            yield (
                f"{prefix}.name is {self.name!r}: expected {', '.join(LABEL_SETS)} or package.module:function"
                f"{did_you_mean(self.name, LABEL_SETS)}"
            )
        else:
            yield from super().problems(prefix)


class LabelsData(ImageData):
    """Images with any number of classes each; labels (N, C) have a 1 for each class of an image, and a 0 for each other.

    Args:
        positional: the first options of `LabelsOptions`, in their order.
        options: the others, by name.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.
    """

    options_type = LabelsOptions

    def _read(self) -> tuple[Images, Images, list[str]]:
        train, val, class_names = super()._read()
        if len(class_names) < 2:
            raise ValueError(f"there is only one class, {class_names[0]!r}: expected at least two")
        if not val.labels.any():
            raise ValueError("no validation image has any class, so nothing can be measured: label some of them")
        return train, val, class_names

    def _groups(self, images: Images) -> Tensor:
        return torch.zeros(len(images.labels), dtype=torch.int64)

    def _classes(self, images: Images) -> Tensor:
        return images.labels.nonzero()[:, 1]

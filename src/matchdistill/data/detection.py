"""The data module of the detection task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matchdistill.data.annotations import read_coco
from matchdistill.data.coco import CocoDataset, CocoImages
from matchdistill.data.masks import rasteriser
from matchdistill.data.module import DataModule, DataOptions, path_problems
from matchdistill.files import path_of

PLACES = ("train_images", "val_images", "train_annotations", "val_annotations")  # below the root


@dataclass
class DetectionOptions(DataOptions):
    """Images with boxes, and with masks if need be, from annotations in the format of COCO.

    `DetectionData` takes these options and the ones of `DataOptions`.

    Args:
        root: the folder that holds the others, as COCO 2017 unpacks.
        train_images: the folder of the training images.
        val_images: the folder of the validation images.
        train_annotations: the training images' boxes and masks.
        val_annotations: the annotations of the validation images, with the same categories.
        masks: read masks, for instance segmentation.
        flip: mirror half of the training images at random.
        bad_annotations: what to do about annotations that cannot be used, for example a box outside of its image, and about
            images that are missing: "refuse" to start and name them, or "skip" them with a warning. COCO 2017 itself
            has two boxes without area.
        skip_empty: leave out training images without objects.
        outside: take images whose file names in the annotations lead out of ``root``, by ``..`` or from ``/`` on.
    """

    indifferent = DataOptions.indifferent | {"root", *PLACES}

    root: Path | None = None
    train_images: str = "train2017"
    val_images: str = "val2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_annotations: str = "annotations/instances_val2017.json"
    masks: bool = False
    flip: bool = True
    bad_annotations: Literal["refuse", "skip"] = "refuse"
    skip_empty: bool = False
    outside: bool = False
    batch_size: int = field(default=16, kw_only=True)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        if self.root is None:
            yield f"give the folder that holds annotations/ and the images' folders as {prefix}.root"
        if self.bad_annotations not in ("refuse", "skip"):
            yield f"{prefix}.bad_annotations is {self.bad_annotations!r}: expected refuse or skip"
        yield from super().problems(prefix)
        yield from path_problems(self.root)


class DetectionData(DataModule):
    """Images with boxes, and with masks if need be, from annotations in the format of COCO.

    Usable without a trainer too: call ``setup()``, which sets the attributes, then ask for loaders. Randomness is a
    function of seed, epoch and rank, and of the number of workers.

    A batch is a list of images (3, H, W), float32 in 0..1 and each of its own size, and a list of targets:
    ``boxes`` (n, 4) float32, (left, top, right, bottom) in pixels; ``labels`` (n,) int64 from 1 on, as 0 is the
    background, in the order of the category ids; ``area`` (n,) float32; ``iscrowd`` (n,) int64; ``image_id``, an int64
    scalar; and ``masks`` (n, H, W) uint8 where they are asked for. Training images come without crowds; an image
    without objects has empty tensors.

    Args:
        positional: the first options of `DetectionOptions`, in their order.
        options: the others, by name.

    Attributes:
        options: all of them, as `DetectionOptions`.
        num_classes: number of categories, without the background.
        class_names: their names: the one of label 1 first.
        category_ids: their ids (num_classes,) int64, likewise.
        train_set: the training images.
        val_set: the validation images.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.
    """

    options_type = DetectionOptions
    fewest: ClassVar[int] = 1  # of a batch: a map of one large image is enough for batch norm
    options: DetectionOptions
    category_ids: Tensor
    train_set: CocoDataset
    val_set: CocoDataset

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, **options)
        assert self.options.root is not None
        self.root = path_of(self.options.root)

    def _read(self) -> tuple[CocoImages, CocoImages, list[str]]:
        options = self.options
        if options.masks:
            rasteriser()  # rather than at the first polygon
        train_names, val_names = (
            (options.train_annotations, options.train_images),
            (options.val_annotations, options.val_images),
        )
        for name in (train_names[0], val_names[0], train_names[1], val_names[1]):
            if not (self.root / name).exists():
                raise ValueError(f"{self.root / name} does not exist{self._did_you_mean(name)}")
        train, categories = self._images(*train_names, training=True)
        val, val_categories = self._images(*val_names, training=False)
        if lone := sorted(categories.items() ^ val_categories.items()):
            raise ValueError(
                f"{self.root}: {train_names[0]} and {val_names[0]} must have the same categories, but "
                f"{lone[0][1]!r} with id {lone[0][0]} is only in one of them"
            )
        if options.skip_empty:
            first, end = train.rows.T
            train = train.subset((first < end).nonzero().flatten())
            if not train.paths:
                raise ValueError(f"{self.root / train_names[0]} has no image with objects")
        self.category_ids = torch.tensor(list(categories))
        return train, val, list(categories.values())

    def _images(self, annotations: str, folder: str, training: bool) -> tuple[CocoImages, dict[int, str]]:
        options, place = self.options, self.root / folder
        # The folder that the user has named may be anywhere.
        inside = self.root if place.resolve().is_relative_to(self.root.resolve()) else place
        within = None if options.outside else inside
        return read_coco(self.root / annotations, place, training, options.masks, options.bad_annotations, within)

    def _did_you_mean(self, name: str) -> str:
        """``; did you mean '/data/coco'?`` for a root that is one step too deep or not deep enough, or nothing."""
        root = self.root.absolute()
        found = next((place for place in (root.parent, *sorted(root.glob("*/"))) if (place / name).exists()), None)
        return f"; did you mean {str(found)!r} as data.root?" if found else ""

    def _groups(self, images: CocoImages) -> Tensor:
        return torch.zeros(len(images.paths), dtype=torch.int64)  # all alike: an image may have objects of any class

    def _dataset(self, images: CocoImages, training: bool) -> CocoDataset:
        objects = (images.annotations.crowds[first:last] == 0 for first, last in images.rows.tolist())
        if not training and not any(found.any() for found in objects):
            raise ValueError(
                f"the {len(images.paths)} validation images of {self.root} have no objects, by which a detector could be "
                "measured: give others, or more of them"
            )
        return CocoDataset(images, training and self.options.flip, self.options.skip_corrupt, self.read)

"""The data module of the detection task."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from matchdistill.data.coco import CocoDataset, CocoImages, read_coco
from matchdistill.data.masks import rasteriser
from matchdistill.data.module import DataModule
from matchdistill.files import path_of


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
        root: the folder that holds the others, as COCO 2017 unpacks.
        train_images: the folder of the training images.
        val_images: the folder of the validation images.
        train_annotations: the training images' boxes and masks.
        val_annotations: those of the validation images, of the same categories.
        batch_size: images per step and process.
        workers: processes that load images; 0 loads in the training process.
        train_part: [first, last]: of the training images in a random order that is the same for every ``seed``, those
            from ``first`` to before ``last``; ``train_limit`` chooses among them. For disjoint images of teacher and
            student.
        val_part: likewise of the validation images. For disjoint images to choose settings by and to report.
        train_limit: use that many training images, a random choice by ``seed``.
        val_limit: use that many validation images, likewise but the same for every ``seed``.
        masks: read masks, for instance segmentation.
        flip: mirror half of the training images at random.
        bad_annotations: what to do about annotations that cannot be used, as of a box outside of its image, and about
            images that are missing: "refuse" to start and name them, or "skip" them with a warning. COCO 2017 itself
            has two boxes without area.
        skip_empty: leave out training images without objects.
        skip_corrupt: leave out images that cannot be read, with a warning, instead of stopping.
        outside: take images whose file names in the annotations lead out of ``root``, by ``..`` or from ``/`` on.
        white: the value that is white in images of more than 8 bits; null: 65535, and of floating-point numbers 1.
        max_pixels: the most pixels of an image; null: 179 million, so that no small damaged file fills the memory.
        seed: of the order, the choice by ``train_limit`` and the workers' flips.

    Attributes:
        num_classes: number of categories, without the background.
        class_names: their names: the one of label 1 first.
        category_ids: their ids (num_classes,) int64, likewise.
        train_set: the training images.
        val_set: the validation images.
    """

    fewest: ClassVar[int] = 1  # of a batch: a map of one large image is enough for batch norm
    category_ids: Tensor
    train_set: CocoDataset
    val_set: CocoDataset

    def __init__(
        self,
        root: Path | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        batch_size: int = 16,
        workers: int = 0,
        train_part: list[int] | None = None,
        val_part: list[int] | None = None,
        train_limit: int | None = None,
        val_limit: int | None = None,
        masks: bool = False,
        flip: bool = True,
        bad_annotations: Literal["refuse", "skip"] = "refuse",
        skip_empty: bool = False,
        skip_corrupt: bool = False,
        outside: bool = False,
        white: float | None = None,
        max_pixels: int | None = None,
        seed: int = 0,
    ) -> None:
        problems = []
        if root is None:
            problems.append("give the folder that holds annotations/ and the images' folders as data.root")
        if bad_annotations not in ("refuse", "skip"):
            problems.append(f"data.bad_annotations is {bad_annotations!r}: expected refuse or skip")
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
        assert root is not None
        self.root = path_of(root)
        self.train_images = train_images
        self.val_images = val_images
        self.train_annotations = train_annotations
        self.val_annotations = val_annotations
        self.masks = masks
        self.flip = flip
        self.bad_annotations: Literal["refuse", "skip"] = bad_annotations
        self.skip_empty = skip_empty
        self.outside = outside

    def _read(self) -> tuple[CocoImages, CocoImages, list[str]]:
        if self.masks:
            rasteriser()  # rather than at the first polygon
        for name in (self.train_annotations, self.val_annotations, self.train_images, self.val_images):
            if not (self.root / name).exists():
                raise ValueError(f"{self.root / name} does not exist{self._did_you_mean(name)}")
        train, categories = self._images(self.train_annotations, self.train_images, training=True)
        val, val_categories = self._images(self.val_annotations, self.val_images, training=False)
        if lone := sorted(categories.items() ^ val_categories.items()):
            raise ValueError(
                f"{self.root}: {self.train_annotations} and {self.val_annotations} must have the same categories, but "
                f"{lone[0][1]!r} with id {lone[0][0]} is only in one of them"
            )
        if self.skip_empty:
            first, end = train.rows.T
            train = train.subset((first < end).nonzero().flatten())
            if not train.paths:
                raise ValueError(f"{self.root / self.train_annotations} has no image with objects")
        self.category_ids = torch.tensor(list(categories))
        return train, val, list(categories.values())

    def _images(self, annotations: str, folder: str, training: bool) -> tuple[CocoImages, dict[int, str]]:
        place = self.root / folder
        # The folder that the user has named may be anywhere.
        inside = self.root if place.resolve().is_relative_to(self.root.resolve()) else place
        within = None if self.outside else inside
        return read_coco(self.root / annotations, place, training, self.masks, self.bad_annotations, within)

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
        return CocoDataset(images, training and self.flip, self.skip_corrupt, self.read)

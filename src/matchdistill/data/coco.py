"""Images with boxes and masks, as batches for detectors.

Axes: N images, A annotations, H height, W width. Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from matchdistill.data.masks import draw_mask
from matchdistill.data.pictures import Picture, Place, read_picture
from matchdistill.data.reading import FileDataset

Sample = tuple[Tensor, dict[str, Tensor]]  # image (3, H, W), target
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

# Whether a picture that is stored on its side is mirrored and overturned after its axes are exchanged, by orientation.
LYING = {5: (False, False), 6: (True, False), 7: (True, True), 8: (False, True)}


@dataclass(frozen=True)
class Annotations:
    """A annotations, those of an image one after another.

    Attributes:
        boxes: (A, 4) float32.
        labels: (A,) int64, from 1 on.
        areas: (A,) float32, of the objects where the file has them, else of the boxes.
        crowds: (A,) int64, 1 for a region with many objects, else 0.
        masks: the masks, pickled (as objects, each worker process would make its own copy); None if they were not read.
        mask_ends: (A,) int64, where in ``masks`` each ends.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor
    masks: bytes | None
    mask_ends: Tensor

    def mask(self, row: int, height: int, width: int) -> Tensor:
        """The mask (H, W) uint8 of an annotation."""
        assert self.masks is not None
        start, end = (int(self.mask_ends[at]) if at >= 0 else 0 for at in (row - 1, row))
        return torch.from_numpy(draw_mask(pickle.loads(self.masks[start:end]), height, width))


@dataclass(frozen=True)
class CocoImages:
    """N images and their annotations.

    Attributes:
        paths: the files.
        ids: (N,) int64.
        sizes: (N, 2) int64, height and width.
        rows: (N, 2) int64: an image's annotations are those from the first to before the second.
        annotations: of these images, and of others.
    """

    paths: list[str]
    ids: Tensor
    sizes: Tensor
    rows: Tensor
    annotations: Annotations

    def subset(self, index: Tensor) -> CocoImages:
        """The images of ``index`` (M,)."""
        paths = [self.paths[i] for i in index.tolist()]
        return replace(self, paths=paths, ids=self.ids[index], sizes=self.sizes[index], rows=self.rows[index])


class CocoDataset(FileDataset):
    """Images with boxes, and masks if they were read, as torchvision's detectors take them.

    Args:
        images: the images.
        flip: whether to mirror half of them at random.
        skip_corrupt: leave images that cannot be read out of their batch, with a warning, instead of stopping.
        read: what reads a file.
    """

    def __init__(
        self, images: CocoImages, flip: bool, skip_corrupt: bool, read: Callable[[Place], Picture] = read_picture
    ) -> None:
        super().__init__(images.paths, skip_corrupt, read=read)
        self.images = images
        self.flip = flip

    def _check(self, index: int, picture: Picture) -> None:
        height, width = self.images.sizes[index].tolist()
        if picture.image.size != (width, height) and not self._lying(index, picture):
            raise ValueError(f"its size is {picture.image.size}, in the annotations {(width, height)}")

    def _lying(self, index: int, picture: Picture) -> bool:
        """Whether the annotations are of the picture as it is stored, on its side, and not as it is looked at."""
        height, width = self.images.sizes[index].tolist()
        return picture.orientation in LYING and picture.image.size == (height, width) != (width, height)

    def _sample(self, index: int, picture: Picture) -> Sample:
        """The image (3, H, W) float32 in 0..1 and its target, as :class:`DetectionData` describes it."""
        image = picture.image
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        notes = self.images.annotations
        first, last = self.images.rows[index].tolist()
        # Copies: with a view, all annotations would travel from a worker process.
        target = {
            "boxes": notes.boxes[first:last].clone(),
            "labels": notes.labels[first:last].clone(),
            "area": notes.areas[first:last].clone(),
            "iscrowd": notes.crowds[first:last].clone(),
            "image_id": self.images.ids[index].clone(),
        }
        if notes.masks is not None:
            height, width = self.images.sizes[index].tolist()
            masks = [notes.mask(row, height, width) for row in range(first, last)]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        if self._lying(index, picture):
            _turn(target, picture)
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
            left, top, right, bottom = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([image.width - right, top, image.width - left, bottom], 1)
            if "masks" in target:
                target["masks"] = target["masks"].flip(-1)
        return pixels, target

    def _batch(self, samples: list[Sample]) -> Batch:
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)


def _turn(target: dict[str, Tensor], picture: Picture) -> None:
    """Turn boxes and masks of a stored picture as the picture was turned to be upright."""
    mirrored, overturned = LYING[picture.orientation]
    top, left, bottom, right = target["boxes"].unbind(1)  # the axes exchanged
    if mirrored:
        left, right = picture.image.width - right, picture.image.width - left
    if overturned:
        top, bottom = picture.image.height - bottom, picture.image.height - top
    target["boxes"] = torch.stack([left, top, right, bottom], 1)
    if "masks" in target:
        sides = [axis for axis, turned in ((2, mirrored), (1, overturned)) if turned]
        target["masks"] = target["masks"].mT.flip(sides).contiguous()

"""What a detector finds in images: boxes, and masks if it has them.

Axes: n boxes of an image, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from matchdistill.data.masks import rasteriser
from matchdistill.files import is_kind
from matchdistill.tasks.detection.module import SHOWN_SCORE, detections
from matchdistill.tasks.predicting import PADDING, Found, Predicting, label_names, text_size, write_text

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#ff7f0e")  # by category


@dataclass(frozen=True)
class Detected(Found):
    """The objects in an image, the surest one first.

    Attributes:
        path: the file of the image.
        labels: names of their categories.
        scores: how sure the detector is of each, from 0 to 1.
        boxes: (left, top, right, bottom) of each, in pixels.
        category_ids: ids of their categories.
        masks: run lengths of each in COCO's compressed form; empty for detectors without masks.
    """

    path: str
    labels: list[str]
    scores: list[float]
    boxes: list[list[float]]
    category_ids: list[int]
    masks: list[dict[str, Any]]

    def rows(self) -> list[list[str | float]]:
        """A line for each box."""
        each = zip(self.labels, self.scores, self.boxes, strict=True)
        return [[self.path, label, score, *box] for label, score, box in each]

    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """An entry for each box, as COCO's results have them, with the path as `file_name`."""
        found = []
        for at, (left, top, right, bottom) in enumerate(self.boxes):
            entry = {
                "image_id": image_id,
                "file_name": self.path,
                "category_id": self.category_ids[at],
                "category": self.labels[at],
                "bbox": [left, top, right - left, bottom - top],
                "score": self.scores[at],
            }
            found.append({**entry, "segmentation": self.masks[at]} if self.masks else entry)
        return found

    def drawn(self, image: Image.Image) -> Image.Image:
        """The image with the boxes that have a score of at least `SHOWN_SCORE`, each with its label."""
        canvas = image.copy()
        draw, size = ImageDraw.Draw(canvas), text_size(image)
        shown = [at for at, score in enumerate(self.scores) if score >= SHOWN_SCORE]
        for at in reversed(shown):  # the surest one lies on top
            box, color = self.boxes[at], COLORS[self.category_ids[at] % len(COLORS)]
            draw.rectangle(tuple(box), outline=color, width=max(1, size // 6))
            place = (box[0] + PADDING, max(0.0, box[1] - size - PADDING) + PADDING)
            write_text(draw, place, f"{self.labels[at]} {self.scores[at]:.0%}", size, color)
        return canvas


@dataclass(frozen=True)
class BoxPredicting(Predicting):
    """How a detector sees pictures.

    Attributes:
        names: of the categories, the one of label 1 first.
        category_ids: likewise.
        top: the most boxes of an image; None: all.
    """

    batch_size: ClassVar[int] = 1  # padding, as in a batch of several, can change what is found

    names: list[str]
    category_ids: list[int]
    top: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], top: int | None = None) -> BoxPredicting:
        """As a config.json says it.

        Args:
            config: its values.
            top: the most boxes of an image; None: all.

        Raises:
            ValueError: it has no ids of the categories.
        """
        names, ids = label_names(config), config.get("category_ids")
        if not is_kind(ids, list[int]) or len(names) != len(ids or []):
            raise ValueError(f"it has no category_ids, one for each of {len(names)} classes")
        return cls(names, list(ids or []), top)

    @property
    def columns(self) -> list[str]:
        """Path, label, score and the box in pixels."""
        return ["path", "label", "score", "left", "top", "right", "bottom"]

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture as an image (3, H, W) in 0..1, of its own size."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255

    def check(self, network: nn.Module) -> None:
        """Nothing: a detector takes images of any size."""

    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> list[Detected]:
        """The boxes of each image, and their masks."""
        return [self._detected(path, own) for path, own in zip(paths, detections(network(images)), strict=True)]

    def _detected(self, path: str, found: dict[str, Tensor]) -> Detected:
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["labels"][order] > 0][: self.top]  # one-stage detectors can find the background, label 0
        own = {name: values[order].cpu() for name, values in found.items()}
        numbers = [label - 1 for label in own["labels"].tolist()]
        if max(numbers, default=0) >= len(self.names):
            raise ValueError(f"it finds label {max(numbers) + 1}, but there are the names of {len(self.names)}")
        return Detected(
            path,
            [self.names[number] for number in numbers],
            own["scores"].tolist(),
            own["boxes"].tolist(),
            [self.category_ids[number] for number in numbers],
            [_run_lengths(mask) for mask in own.get("masks", [])],
        )


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """A mask (H, W) in COCO's compressed form."""
    packed = rasteriser().encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}

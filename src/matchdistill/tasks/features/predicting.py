"""What a backbone makes of images: one vector for each.

Axes: N batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from matchdistill.tasks.classification.predicting import ClassPredicting
from matchdistill.tasks.features.pooling import Pooling, find_pooling, part_of
from matchdistill.tasks.predicting import Found, Predicting


@dataclass(frozen=True)
class Embedded(Found):
    """The pooled output of an image.

    Attributes:
        path: the file of the image.
        features: its C numbers.
    """

    path: str
    features: list[float]

    def rows(self) -> list[list[str | float]]:
        """One line: the path, then the numbers."""
        return [[self.path, *self.features]]

    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """One entry: path and features."""
        return [{"path": self.path, "features": self.features}]

    def drawn(self, image: Image.Image) -> Image.Image:
        """Nothing can be drawn of features.

        Raises:
            ValueError: always.
        """
        raise ValueError("--draw is for students that find classes, boxes or pixels: leave it out")


class FeaturePredicting(Predicting):
    """How a backbone sees pictures.

    Args:
        config: the values of its config.json.

    Raises:
        ValueError: they do not say how images are prepared, or how many features there are.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.pictures = ClassPredicting.of({**config, "num_classes": 1, "label_names": None})
        width = config.get("num_features")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"num_features is {width!r}: expected how many features an image has")
        self.width = width
        self.pooling: Pooling | None = None

    @property
    def columns(self) -> list[str]:
        """Path, and feature_0, feature_1 and so on."""
        return ["path", *(f"feature_{number}" for number in range(self.width))]

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture as an image (3, H, W)."""
        return self.pictures.prepare(image)

    def check(self, network: nn.Module) -> None:
        """Raise a ValueError unless a network gives as many features as are expected."""
        size = self.pictures.image_size
        images = torch.zeros(2, 3, size, size)
        self.pooling = find_pooling(part_of(network), images, "student")
        with torch.no_grad():
            found = self.pooling(part_of(network.eval()), images)
        if found.shape != (2, self.width):
            raise ValueError(f"the student gives {found.shape[1]} features for an image, expected {self.width}")

    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> list[Embedded]:
        """The pooled output of each image."""
        assert self.pooling is not None
        found = self.pooling(part_of(network), torch.stack(images)).float()
        return [Embedded(path, own) for path, own in zip(paths, found.tolist(), strict=True)]

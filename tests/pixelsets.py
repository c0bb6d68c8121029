"""Sets with a class for every pixel, and networks for them, that are small enough to train in a test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from matchdistill.models.small import ResidualBlock

CLASSES = ["ground", "cross", "disc"]
# Networks by name, a run of seconds.
NETWORK = "pixelsets:small_segmenter"
SMALL: dict[str, Any] = {
    "task": "segmentation",
    "data": {"name": "folder", "crop": [32, 40], "batch_size": 4},
    "teacher": {"name": NETWORK, "options": {"width": 16}},
    "student": {"name": NETWORK, "options": {"width": 8}},
    "training": {"epochs": 2, "lr": 0.02, "schedule": "cosine"},
    "distillation": {"method": "mgd-amp"},
    "trainer": {"accelerator": "cpu", "log_every": 1},
}
TAPS = ["layer1.relu2:input", "layer2.relu2:input"]  # of the backbone


class SmallBody(nn.Module):
    """Maps of the strides 2 and 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = ResidualBlock(width, width, 1)
        self.layer2 = ResidualBlock(width, 2 * width, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.layer1(self.relu(self.bn1(self.conv1(images))))
        return {"low": low, "high": self.layer2(low)}


class SmallSegmenter(nn.Module):
    """A backbone and two heads, in torchvision's form."""

    def __init__(self, num_classes: int, width: int, aux: bool) -> None:
        super().__init__()
        self.backbone = SmallBody(width)
        self.neck = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.second = nn.Conv2d(width, num_classes, 1) if aux else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        found = {"out": self.classifier(self.neck(maps["high"]))}
        if self.second is not None and self.training:
            found["aux"] = self.second(maps["low"])
        size = images.shape[-2:]
        return {name: F.interpolate(value, size, mode="bilinear", align_corners=False) for name, value in found.items()}


def small_segmenter(num_classes: int = 3, width: int = 8, aux: bool = False) -> SmallSegmenter:
    return SmallSegmenter(num_classes, width, aux)


def scene(number: int, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image with a cross and a disc on noise, and its mask, whose frame is of no class; of one of three sizes."""
    height, width = [(36, 44), (28, 48), (40, 36)][number % 3]
    pixels = chance.integers(0, 90, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for label, channel in ((1, 0), (2, 1)):
        row, column = int(chance.integers(8, height - 8)), int(chance.integers(8, width - 8))
        down, right = abs(rows - row), abs(columns - column)
        inside = (
            (np.minimum(down, right) < 3) & (np.maximum(down, right) < 8) if label == 1 else down**2 + right**2 < 40
        )
        pixels[inside, channel], mask[inside] = 230, label
    mask[0] = mask[-1] = 255
    return pixels, mask


def write_pixels(root: Path, train: int = 8, val: int = 5) -> Path:
    """A folder of images and masks: gray ones for training, with a palette for validation."""
    chance = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            pixels, mask = scene(number, chance)
            Image.fromarray(pixels).save(root / split / "images" / f"{number:03}.png")
            picture = Image.fromarray(mask, "L" if split == "train" else "P")
            if split == "val":
                picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, *[255] * 759])
            picture.save(root / split / "masks" / f"{number:03}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root

"""A COCO set and detectors that are small enough to train in a test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from matchdistill.models.small import ResidualBlock

CATEGORIES = {3: "cross", 7: "disc", 11: "bar"}  # ids with gaps, as COCO's

DETECTOR = {
    "architecture": "retinanet",
    "backbone": "detectors:SmallBackbone",
    "frozen_stages": 1,
    "pyramid_channels": 16,
    "anchor_size": 8,
    "min_size": [48, 64],
    "max_size": 96,
}
# Networks by name, a run of seconds.
SMALL: dict[str, Any] = {
    "task": "detection",
    "data": {"batch_size": 4},
    "teacher": {"name": "matchdistill.models:detector", "options": {**DETECTOR, "backbone": "detectors:WideBackbone"}},
    "student": {"name": "matchdistill.models:detector", "options": DETECTOR},
    "training": {"epochs": 2, "lr": 0.01, "schedule": "cosine"},
    "distillation": {"method": "mgd-amp", "norm": "group"},
    "trainer": {"accelerator": "cpu", "log_every": 1},
}


class SmallBackbone(nn.Module):
    """A classifier with maps of the strides 4, 8, 16 and 32; stages of one block but the first, which has two."""

    width = 8

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        width = self.width
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(ResidualBlock(width, width, 1), ResidualBlock(width, width, 1))
        for stage in (2, 3, 4):
            channels = width * (stage - 1)
            setattr(self, f"layer{stage}", nn.Sequential(ResidualBlock(channels, width * stage, 2)))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer1(self.pool(self.relu(self.bn1(self.conv1(images)))))
        return self.fc(self.layer4(self.layer3(self.layer2(maps))).mean((2, 3)))


class WideBackbone(SmallBackbone):
    width = 16


TAPS = ["layer1.1.relu2:input", "layer2.0.relu2:input", "layer3.0.relu2:input", "layer4.0.relu2:input"]


def write_coco(root: Path, train: int = 8, val: int = 5) -> Path:
    """A folder as COCO 2017 unpacks: bright rectangles on noise; the first training image is empty, a region is a crowd."""
    chance = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = [(48, 64), (64, 48), (56, 56)][number % 3]
            pixels = chance.integers(0, 90, (height, width, 3), dtype=np.uint8)
            for _ in range(0 if split == "train" and number == 0 else 1 + number % 3):
                category = int(chance.choice(list(CATEGORIES)))
                size = chance.integers(10, 34, 2)
                left, top = (
                    int(chance.integers(0, most - side)) for most, side in zip((width, height), size, strict=True)
                )
                right, bottom = left + int(size[0]), top + int(size[1])
                pixels[top:bottom, left:right, list(CATEGORIES).index(category)] = 220
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 100 + number,
                        "category_id": category,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top),
                        "iscrowd": 0,
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
            images.append({"id": 100 + number, "file_name": f"{number:03}.png", "height": height, "width": width})
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{number:03}.png")
        if split == "val":
            counts = [0, images[1]["height"] * 12, images[1]["height"] * (images[1]["width"] - 12)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 101,
                    "category_id": 7,
                    "bbox": [0, 0, 12, images[1]["height"]],
                    "area": counts[1],
                    "iscrowd": 1,
                    "segmentation": {"counts": counts, "size": [images[1]["height"], images[1]["width"]]},
                }
            )
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def as_found(network: nn.Module) -> nn.Module:
    """Batch norms with statistics, scales and shifts of their own."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return network


def own_detector(num_classes: int) -> nn.Module:
    """One of torchvision's API that nothing here has built: a body without a pyramid."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    network = SmallBackbone()
    body = nn.Sequential(*list(network.children())[:-1])
    body.out_channels = 32
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    pooling = MultiScaleRoIAlign(["0"], 3, 2)
    return FasterRCNN(body, num_classes + 1, 64, 96, rpn_anchor_generator=anchors, box_roi_pool=pooling)


# Further options of the detectors with two stages: few proposals.
FEW = {
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
}


def scenes(count: int = 6) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Targets with crowds, and detections near them, of images of 200 px; labels are 1, 2, 3."""
    chance = np.random.default_rng(0)
    targets, found = [], []
    for _ in range(count):
        boxes = chance.uniform(0, 140, (5, 2))
        sides = np.exp(chance.uniform(1.5, 4, (5, 2)))
        boxes = np.round(np.concatenate([boxes, np.minimum(boxes + sides, 199)], 1))
        labels, crowd = chance.integers(1, 4, 5), np.array([0, 0, 0, 0, 1])
        masks = np.zeros((5, 200, 200), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
            mask[top : bottom + 1, left : right + 1] = 1
            mask[top, left] = 0  # so that a mask is not its box
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "masks": masks, "area": masks.sum((1, 2))})
        keep = chance.integers(0, 5, 12)
        moved = np.clip(boxes[keep] + chance.normal(0, 3, (12, 4)), 0, 199)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        shifted = np.stack([np.roll(masks[number], chance.integers(-3, 4, 2), (0, 1)) for number in keep])
        own = {"boxes": moved, "labels": np.where(chance.random(12) < 0.8, labels[keep], 1), "masks": shifted}
        found.append({**own, "scores": chance.random(12)})
    return targets, found


def as_tensors(
    found: list[dict[str, Any]], targets: list[dict[str, Any]], masks: bool
) -> list[list[dict[str, Tensor]]]:
    """Detections and targets as the metric takes them, without masks where there are to be none."""
    kinds = {"boxes": torch.float32, "labels": torch.int64, "iscrowd": torch.int64, "area": torch.float32}
    kinds |= {"scores": torch.float32, "masks": torch.bool}

    def tensors(image: dict[str, Any]) -> dict[str, Tensor]:
        return {key: torch.as_tensor(value).to(kinds[key]) for key, value in image.items() if masks or key != "masks"}

    return [[tensors(image) for image in images] for images in (found, targets)]


def precision_of_two(rank: int) -> dict[str, float]:
    """What each of two processes measures of the scenes, of which the first has more."""
    from matchdistill.tasks.detection.module import average_precision

    metric = average_precision(masks=True)
    for number, (found, target) in enumerate(zip(*as_tensors(*scenes()[::-1], masks=True), strict=True)):
        if (number < 4) == (rank == 0):
            metric.update([found], [target])
    return {name: float(value) for name, value in metric.compute().items() if value.numel() == 1}

"""What a detector makes of the validation images.

Axes: n boxes of an image, m boxes that were found, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from matchdistill.tasks.judging import Judge, Judged

OVERLAP = 0.5  # the IoU from which on a box counts as found


class BoxJudge(Judge):
    """Keeps the boxes that are found.

    Args:
        num_classes: C, without the background.
        measure: computes average precision, of this process alone: it has all images, and the others may wait elsewhere.
        score: from which on a box counts when an image is graded.
    """

    def __init__(self, num_classes: int, measure: MeanAveragePrecision, score: float) -> None:
        self.num_classes, self._measure, self._score = num_classes, measure, score
        self._measure.class_metrics = True
        self._grades: list[float] = []
        self._counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, network: nn.Module, batch: Any) -> None:
        """Detect the objects of a batch."""
        images, targets = batch
        found = []
        for each in network(images):
            order = each["scores"].argsort(descending=True, stable=True)
            own = {name: each[name][order].cpu() for name in ("boxes", "scores", "labels")}
            found.append(own | {name: own[name].float() for name in ("boxes", "scores")})
        kept = ("boxes", "labels", "iscrowd", "area")
        truth = [{name: each[name].cpu() for name in kept if name in each} for each in targets]
        self._measure.update(found, truth)
        for own, true in zip(found, truth, strict=True):
            sure = own["scores"] >= self._score
            objects = true["iscrowd"] == 0 if "iscrowd" in true else torch.ones(len(true["labels"]), dtype=torch.bool)
            boxes, labels = true["boxes"][objects], true["labels"][objects]
            self._counts += (labels - 1).bincount(minlength=self.num_classes)
            self._grades.append(f1_score(own["boxes"][sure], own["labels"][sure], boxes, labels))

    def judged(self) -> Judged:
        """An image is graded by the F1 score of its boxes."""
        computed = self._measure.compute()
        classes = torch.full((self.num_classes,), torch.nan, dtype=torch.float64)
        known = computed["classes"].reshape(-1).long() - 1
        own = known < self.num_classes  # a pre-trained teacher may find others
        classes[known[own]] = computed["map_per_class"].reshape(-1)[own].double()
        return Judged(
            measure="AP",
            counted="objects",
            grade=torch.tensor(self._grades),
            classes=torch.where(self._counts > 0, classes, torch.nan),
            counts=self._counts,
            graded=f"An image is won if the F1 score of its boxes is higher. Boxes with a score of at least {self._score:g} "
            f"count. One is right if it overlaps a true box of its class by an IoU of at least {OVERLAP:g}.",
        )


def f1_score(found: Tensor, found_labels: Tensor, boxes: Tensor, labels: Tensor) -> float:
    """How well the boxes of an image were found: 1 for all of them and no others.

    Args:
        found: boxes that were found (m, 4), the most certain first.
        found_labels: their classes (m,).
        boxes: what is true (n, 4).
        labels: their classes (n,).

    Returns:
        2 hits / (m + n), where a hit is a box of the right class that overlaps one that none before it has, by an IoU of
        `OVERLAP`; 1 where there is nothing and nothing was found.
    """
    if not len(found) + len(boxes):
        return 1.0
    overlaps = box_iou(found, boxes) * (found_labels[:, None] == labels)
    hits = 0
    for row in range(len(found)):
        if len(boxes) and float(overlaps[row].max()) >= OVERLAP:
            overlaps[:, int(overlaps[row].argmax())] = 0
            hits += 1
    return 2 * hits / (len(found) + len(boxes))

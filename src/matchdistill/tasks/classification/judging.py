"""What a classifier makes of the validation images.

Axes: N images, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matchdistill.tasks.judging import Judge, Judged, confidence_bins, confused_pairs, shares_by_class


class ClassJudge(Judge):
    """Keeps the class that is found in each image, and how sure the network is of it.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Classify a batch."""
        images, labels = batch
        confidence, found = network(images).float().softmax(1).max(1)
        self._seen.append((labels.cpu(), found.cpu(), confidence.cpu()))

    def judged(self) -> Judged:
        """An image is done well, 1, or not, 0."""
        labels, found, confidence = (torch.cat(each) for each in zip(*self._seen, strict=True))
        right = found == labels
        classes, counts = shares_by_class(right, labels, self.num_classes)
        return Judged(
            measure="accuracy",
            counted="images",
            grade=right.float(),
            classes=classes,
            counts=counts,
            confused=confused_pairs(labels, found),
            bins=confidence_bins(confidence, right),
            found=found.int(),
            confidence=confidence,
            graded="An image is won if this student is right and the other network is wrong.",
        )

"""What a network that gives every pixel a class makes of the validation images.

Axes: N images, C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from matchdistill.data.segmentation import Batch
from matchdistill.tasks.judging import BINS, MOST_PAIRS, Judge, Judged, confidence_bins
from matchdistill.tasks.segmentation.outputs import segment


class PixelJudge(Judge):
    """Counts how often the pixels of each class are taken for each class.

    Args:
        num_classes: C.
        apart: gives the images of a batch one by one, without their padding.
    """

    def __init__(self, num_classes: int, apart: Callable[[Tensor, Tensor], Iterator[Batch]]) -> None:
        self.num_classes, self._apart = num_classes, apart
        self._pairs = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._bins = torch.zeros(BINS, 3, dtype=torch.float64)
        self._grades: list[Tensor] = []

    def add(self, network: nn.Module, batch: Batch) -> None:
        """Segment a batch, image by image, as padding would change what is found."""
        for images, labels in self._apart(*batch):
            confidence, found = segment(network, images).logits.float().softmax(1).max(1)
            counted = labels >= 0
            truth, found, confidence = labels[counted].cpu(), found[counted].cpu(), confidence[counted].cpu()
            places = self.num_classes * truth + found
            pairs = places.bincount(minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)
            self._pairs += pairs
            self._bins += confidence_bins(confidence, found == truth)
            ious = intersections_over_unions(pairs)
            self._grades.append(ious.nanmean() if len(truth) else ious.new_ones(()))

    def judged(self) -> Judged:
        """An image is graded by its mean IoU over the classes that it has or was given."""
        pairs = self._pairs.nonzero()
        confused = torch.cat([pairs, self._pairs[pairs[:, 0], pairs[:, 1], None]], 1)
        order = confused[:, 2].argsort(descending=True, stable=True)[:MOST_PAIRS]
        return Judged(
            measure="IoU",
            counted="pixels",
            grade=torch.stack(self._grades).float(),
            classes=intersections_over_unions(self._pairs),
            counts=self._pairs.sum(1),
            confused=confused[order],
            bins=self._bins,
            graded="An image is won if its mean IoU is higher, over the classes that it has or was given.",
        )


def intersections_over_unions(pairs: Tensor) -> Tensor:
    """IoU of each class (C,) by how often (C, C) a true class was taken for each class; NaN where neither has it."""
    both = pairs.diagonal().double()
    return both / (pairs.sum(0) + pairs.sum(1) - both)

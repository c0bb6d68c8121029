"""What a classifier of images with any number of labels makes of the validation images.

Axes: N images, C classes.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

from matchdistill.tasks.judging import Judge, Judged

THRESHOLD = 0.5  # the probability from which on a class counts as found


class LabelsJudge(Judge):
    """Keeps the probability of every class in each image."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Find the classes of a batch."""
        images, labels = batch
        self._seen.append((labels.cpu() > 0, network(images).float().sigmoid().cpu()))

    def judged(self) -> Judged:
        """An image is graded by what its true classes and the ones that were found share, of all of these (Jaccard)."""
        labels, probabilities = (torch.cat(each) for each in zip(*self._seen, strict=True))
        found, counts = probabilities >= THRESHOLD, labels.sum(0)
        either = (labels | found).sum(1)
        with warnings.catch_warnings():  # of classes that no image has
            warnings.simplefilter("ignore")
            classes = multilabel_average_precision(probabilities, labels.long(), labels.shape[1], average=None)
        return Judged(
            measure="AP",
            counted="images",
            grade=torch.where(either > 0, (labels & found).sum(1) / either.clamp_min(1), 1.0),
            classes=torch.where(counts > 0, torch.as_tensor(classes).double(), torch.nan),
            counts=counts,
            graded="An image is won if more of its classes are right: the classes that are both true and found, as a share "
            "of the classes that are true or found.",
        )

"""What trains a classifier whose images have any number of classes: a yes or no for each class.

Axes: N batch, C classes.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.multilabel.judging import THRESHOLD, LabelsJudge

MEAN_AP = "mean_ap"
PRECISIONS = (Metric(MEAN_AP, "mean average precision"),)


class MultilabelLoss(nn.Module):
    """Binary cross-entropy of each class, the mean over batch and classes."""

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels as they are."""
        return images, labels

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits (N, C) by labels (N, C), each 0 or 1."""
        return F.binary_cross_entropy_with_logits(output, targets.to(output.dtype))


def binary_kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.5) -> Tensor:
    """Distillation of each class on its own: ``T^2 KL(sigmoid(t / T) || sigmoid(s / T))``, the mean over all.

    Args:
        student: logits (N, C), in the graph.
        teacher: logits (N, C).
        temperature: T.

    Returns:
        A scalar that sends gradients to the student alone; 0 where both are the same.

    Examples:
        >>> binary_kd_loss(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.5, -1.0]]))
        tensor(0.)
    """
    taught, told = teacher.detach().float() / temperature, student.float() / temperature
    shares = taught.sigmoid()
    apart = shares * (F.logsigmoid(taught) - F.logsigmoid(told))
    return temperature**2 * (apart + (1 - shares) * (F.logsigmoid(-taught) - F.logsigmoid(-told))).mean()


class MeanPrecision(MultilabelAveragePrecision):
    """Average precision, the mean over the classes that at least one image has.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Tensor:  # type: ignore[override]  # one number of many
        """The mean; 0 where no image has a class."""
        with warnings.catch_warnings():  # of classes that no image has, which are left out here
            warnings.simplefilter("ignore")
            each = torch.as_tensor(super().compute())
        there = dim_zero_cat(self.target).sum(0) > 0
        return each[there].mean() if there.any() else each.new_zeros(())


class MultilabelModule(ClassificationModule):
    """Trains a student on any number of labels an image, and on its teacher's features, outputs, both or neither."""

    measured: ClassVar[tuple[Metric, ...]] = PRECISIONS

    @staticmethod
    def measure_of(num_classes: int) -> MetricCollection:
        """Average precision, the mean over the classes that validation images have."""
        return MetricCollection({MEAN_AP: MeanPrecision(num_classes)})

    def judge(self, num_classes: int) -> LabelsJudge:
        """What looks at all validation images for the page."""
        return LabelsJudge()

    def loss_of(self, num_classes: int, labels: Tensor | None) -> MultilabelLoss:
        """The loss on labels."""
        return MultilabelLoss()

    def kd(self, output: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """The loss of logits (N, C) by the teacher's."""
        return binary_kd_loss(output, taught, temperature)

    def true_names(self, labels: Tensor, class_names: list[str]) -> list[str]:
        """The classes of labels (N, C)."""
        return [", ".join(class_names[at] for at in row.nonzero().flatten().tolist()) or "none" for row in labels]

    def found_names(self, logits: Tensor, class_names: list[str]) -> list[str]:
        """The classes that logits (N, C) find, each with its probability."""
        return [
            ", ".join(f"{class_names[at]} ({row[at]:.0%})" for at in found_in(row)) or "none"
            for row in logits.sigmoid().cpu()
        ]


def found_in(probabilities: Tensor) -> list[int]:
    """The classes of probabilities (C,) that count as found, the most probable one first.

    Examples:
        >>> found_in(torch.tensor([0.5, 0.2, 0.9]))
        [2, 0]
    """
    order: list[int] = probabilities.argsort(descending=True, stable=True).tolist()
    return [at for at in order if probabilities[at] >= THRESHOLD]

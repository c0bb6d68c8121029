"""What a network makes of the validation images, kept small: a grade for each image, a value for each class.

Axes: N images, C classes, K pairs of classes, B bins of confidence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

BINS = 15
MOST_PAIRS = 20_000  # pairs of classes whose confusions are kept, the most frequent ones


@dataclass(frozen=True)
class Judged:
    """What a network made of the validation images.

    Attributes:
        measure: what the values of the classes are, for people: "accuracy", "AP", "IoU".
        counted: what `counts` are of: "images", "objects", "pixels".
        grade: how well each image (N,) was done, from 0 to 1.
        classes: the value of each class (C,); NaN where no image has the class.
        counts: how many there are of each class (C,).
        confused: pairs (K, 3) of a true class, the class that was found, and how often; None: the task has no such pairs.
        bins: of confidence (B, 3), see `confidence_bins`; None: the task has no confidence that can be compared.
        found: the class (N,) that was found in each image; None: images have no single class.
        confidence: the probability (N,) that the network gave the class it found; None likewise.
        graded: how images were graded, in a sentence for people; empty in runs of earlier versions.
    """

    measure: str
    counted: str
    grade: Tensor
    classes: Tensor
    counts: Tensor
    confused: Tensor | None = None
    bins: Tensor | None = None
    found: Tensor | None = None
    confidence: Tensor | None = None
    graded: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept in a file, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def told(self) -> dict[str, str]:
        """What is kept in words."""
        return {"measure": self.measure, "counted": self.counted, "graded": self.graded}


class Judge(ABC):
    """Looks at what one network makes of the validation images, batch by batch."""

    @abstractmethod
    def add(self, network: nn.Module, batch: Any) -> None:
        """Run the network, in evaluation mode, on a batch of validation images."""

    @abstractmethod
    def judged(self) -> Judged:
        """What it made of all images so far."""


def confidence_bins(confidence: Tensor, right: Tensor) -> Tensor:
    """Sums over predictions in equal bins of confidence.

    Args:
        confidence: of each prediction (N,), from 0 to 1.
        right: whether it was right (N,).

    Returns:
        (B, 3) float64: how many predictions are in each bin, their confidences added up, and how many are right.

    Examples:
        >>> confidence_bins(torch.tensor([0.99, 0.97]), torch.tensor([True, False]))[-1]
        tensor([2.0000, 1.9600, 1.0000], dtype=torch.float64)
    """
    confidence = confidence.double()
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, right.double()], 1)
    return confidence.new_zeros(BINS, 3).index_add_(0, place, columns)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error of `confidence_bins`: how far confidence and accuracy lie apart, on average.

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.

    Examples:
        >>> round(calibration_error(confidence_bins(torch.tensor([0.99, 0.97]), torch.tensor([True, False]))), 2)
        0.48
    """
    return float((bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum().clamp_min(1))


def confused_pairs(truth: Tensor, found: Tensor) -> Tensor:
    """How often each class was taken for each other, or for itself.

    Args:
        truth: the true class of each image or pixel (N,).
        found: the class that was found (N,).

    Returns:
        (K, 3) int64: true class, class that was found, how often; the most frequent first.

    Examples:
        >>> confused_pairs(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1]))
        tensor([[0, 1, 2],
                [0, 0, 1],
                [1, 1, 1]])
    """
    pairs, counts = torch.stack([truth, found], 1).unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
    order = counts.argsort(descending=True, stable=True)[:MOST_PAIRS]
    return torch.cat([pairs, counts[:, None]], 1)[order]


def shares_by_class(right: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The share of each class (C,) that is right, NaN where there is none of it, and how many there are (C,)."""
    counts = truth.bincount(minlength=num_classes)
    return truth[right].bincount(minlength=num_classes).double() / counts, counts

"""The losses of pixels, over those that count.

Axes: N batch, C classes, H height, W width, P pixels that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matchdistill.data.pixels import IGNORED
from matchdistill.functional import kd_loss


def pixel_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, its mean over the pixels that count; a zero in the graph if there are none.

    Args:
        logits: (N, C, H, W).
        labels: (N, H, W) int64, negative where a pixel does not count.
        weights: of the classes (C,), by which the mean is weighted; None: all alike.
        smoothing: the share of a label that is spread over all classes.
    """
    labels = labels.clamp_min(IGNORED)
    total = F.cross_entropy(
        logits.float(), labels, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    counted = labels[labels >= 0]
    if weights is None:
        return total / max(counted.numel(), 1)
    return total / weights[counted].sum().clamp_min(torch.finfo(weights.dtype).tiny)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of a batch, its mean over the classes that the batch has; without any, zero.

    Source: F. Milletari et al., "V-Net", 3DV 2016, with sums instead of sums of squares below the line.

    Args:
        logits: (N, C, H, W).
        labels: (N, H, W) int64, negative where a pixel does not count.
    """
    counted = (labels >= 0)[:, None]
    shares = logits.float().softmax(1) * counted
    truth = F.one_hot(labels.clamp_min(0), logits.shape[1]).movedim(-1, 1) * counted
    both, sizes, true = ((each.sum((0, 2, 3))) for each in (shares * truth, shares, truth))
    there = true > 0
    dice = 2 * both / (sizes + true).clamp_min(1e-7)
    return ((1 - dice) * there).sum() / there.sum().clamp_min(1)


def pixel_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Hinton's distillation of the output, its mean over the pixels that count; a zero in the graph if there are none.

    Args:
        student: logits (N, C, H, W), in the graph.
        teacher: logits (N, C, H, W).
        labels: (N, H, W) int64, negative where a pixel does not count.
        temperature: of the softmax.
    """
    counted = labels >= 0
    if not counted.any():
        return student.sum() * 0
    return kd_loss(student.movedim(1, -1)[counted], teacher.movedim(1, -1)[counted], temperature)

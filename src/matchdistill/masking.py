"""Sums over the positions that count, where images are padded to a batch.

A mask (N, *), bool, is True at the positions that count. Whatever the others hold (NaN too) reaches neither a result nor a
gradient.

Axes: N batch, C channels, * position axes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features (N, C, *) with zeros at the positions that do not count; without a mask they themselves.

    Raises:
        ValueError: a mask that is not bool or not (N, *).
    """
    return features if mask is None else features.masked_fill(left_out(features, mask), 0)


def left_out(features: Tensor, mask: Tensor) -> Tensor:
    """Where positions of features (N, C, *) do not count, bool (N, 1, *).

    Raises:
        ValueError: a mask that is not bool or not (N, *).
    """
    expected = (*features.shape[:1], *features.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"mask of {mask.dtype} {tuple(mask.shape)} for features {tuple(features.shape)}: expected torch.bool "
            f"{expected}, True at the positions that count"
        )
    return ~mask[:, None]


def squared(differences: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None) -> Tensor:
    """Sum or mean of the squares of (N, C, *) at the positions that count; a zero in the graph if there are none."""
    return sum_or_mean(masked(differences, mask).square().sum(), differences, loss_reduction, mask)


def sum_or_mean(total: Tensor, values: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None) -> Tensor:
    """The total over the values (N, C, *) that count, or their mean: the total over their number."""
    if loss_reduction == "sum":
        return total
    if mask is None:
        return total / max(values.numel(), 1)
    return total / (mask.sum() * values.shape[1]).clamp_min(1)

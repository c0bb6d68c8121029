"""Classes as colours.

Axes: C classes, H height, W width.
"""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

SHARE = 0.6  # of a class's colour in an overlay
GOLDEN = 0.61803398875  # by which hues of neighbouring numbers lie far apart


def colours(count: int) -> Tensor:
    """A colour (C, 3) in 0..1 for each class; black for class 0.

    Examples:
        >>> colours(2).tolist()[0]
        [0.0, 0.0, 0.0]
    """
    found = [(0.0, 0.0, 0.0)]
    for number in range(1, count):
        value = (0.95, 0.75, 0.55)[number // 7 % 3]
        found.append(colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.85, value))
    return torch.tensor(found[:count])


def overlay(image: Tensor, labels: Tensor, palette: Tensor) -> Tensor:
    """An image (3, H, W) in 0..1 under the colours (C, 3) of its labels (H, W); where these are negative it is white."""
    painted = palette.to(image.device)[labels.clamp_min(0)].movedim(-1, 0)
    painted = torch.where(labels < 0, torch.ones_like(painted), painted)
    return (1 - SHARE) * image.clamp(0, 1) + SHARE * painted

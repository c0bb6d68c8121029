"""A network to look for taps in, and what the builders of all libraries share.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
HEADS = r"(^|\.)(heads?|fc|classifier|\w+_classifier|last_linear|decoder|\w+_head|neck|fpn|bbox_\w+|class_\w+)(\.|$)"


@dataclass
class Network:
    """A network to look for taps in.

    Attributes:
        model: the network.
        example: the arguments of its forward pass.
        features: its modules that return the features of a stage, by the library's own names, from shallow to deep, with
            their channels where they are known.
        intermediates: returns these features in their place, where no module of the network does.
        heads: expression for the paths of modules that are no part of the body.
        sequence: whether values of three axes are (N, C, L).
    """

    model: nn.Module
    example: tuple[Any, ...]
    features: list[tuple[str, int | None]] = field(default_factory=list)
    intermediates: Callable[[], list[Tensor]] | None = None
    heads: str = HEADS
    sequence: bool = False


def images(size: int, channels: int = 3) -> Tensor:
    """Square images of noise (N, C, H, W)."""
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def numbered(model: nn.Module, *patterns: str) -> list[tuple[str, int | None]]:
    """The modules whose path is one of the patterns, in their order; "#" is a number, "*" a name.

    Examples:
        >>> numbered(nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU()), "#")
        [('0', None), ('1', None)]
    """
    expressions = [
        re.compile(pattern.replace(".", r"\.").replace("#", r"\d+").replace("*", r"\w+")) for pattern in patterns
    ]
    return [(path, None) for path, _ in model.named_modules() if any(each.fullmatch(path) for each in expressions)]

"""What a network that gives every pixel a class returns, brought to the size of its images.

Axes: N batch, C classes, H height, W width; h, w of the network's own map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.models.segmentation import backbone_of

MAIN, AUX = ("out", "logits"), ("aux", "aux_logits")  # names in dictionaries and dataclasses


class Outputs(NamedTuple):
    """Logits of every pixel.

    Attributes:
        logits: (N, C, H, W).
        aux: of a second head that is only trained with (N, C, H, W); None: there is none.
    """

    logits: Tensor
    aux: Tensor | None = None

    def resized(self, size: tuple[int, int]) -> Outputs:
        """With the height and width of the images, by bilinear interpolation where they are others."""
        return Outputs(_resized(self.logits, size), None if self.aux is None else _resized(self.aux, size))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def outputs_in(output: Any) -> Outputs:
    """The logits in what a network returned: a tensor, a dictionary or dataclass, or a tuple that begins with them.

    Raises:
        ValueError: there are none.

    Examples:
        >>> import torch
        >>> outputs_in({"out": torch.zeros(1, 5, 8, 8), "aux": torch.ones(1, 5, 8, 8)}).aux.shape
        torch.Size([1, 5, 8, 8])
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    names = [(_entry(output, name) for name in each) for each in (MAIN, AUX)]
    logits, aux = (next((value for value in each if value is not None), None) for each in names)
    logits = first if isinstance(first, Tensor) else logits
    if logits is None or logits.ndim != 4:
        found = type(output).__name__ if logits is None else tuple(logits.shape)
        raise ValueError(f"gives {found}: expected logits (N, classes, H, W), alone or as 'out' or 'logits'")
    return Outputs(logits, aux)


def _entry(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def divisor_of(network: nn.Module) -> int:
    """What height and width of a network's images must be multiples of; 1: of nothing."""
    if not getattr(network, "requires_divisible_input_shape", False):
        return 1
    return int(getattr(network.get_submodule(backbone_of(network)), "output_stride", 1))


def fitted(networks: Sequence[nn.Module], images: Tensor) -> Tensor:
    """Images (N, 3, H, W) with zeros at the bottom and on the right where their size does not fit the networks."""
    divisor = math.lcm(*map(divisor_of, networks))
    height, width = images.shape[-2:]
    return images if divisor == 1 else F.pad(images, (0, -width % divisor, 0, -height % divisor))


def segment(network: nn.Module, images: Tensor) -> Outputs:
    """Run a network on images (N, 3, H, W), padded for it where their size does not fit; logits are of their size."""
    height, width = images.shape[-2:]
    padded = fitted([network], images)
    found = outputs_in(network(padded)).resized((padded.shape[-2], padded.shape[-1]))
    return Outputs(*(None if maps is None else maps[..., :height, :width] for maps in found))  # type: ignore[arg-type]

"""What the gallery of a run's page shows of an image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Picture(NamedTuple):
    """What is true of an image, or was found in it, as a picture of any kind that a task draws.

    Attributes:
        pixels: (3, H, W) in 0..1.
        words: what is to be seen, for a caption.
    """

    pixels: Tensor
    words: str

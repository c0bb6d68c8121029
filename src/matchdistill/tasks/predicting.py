"""How a student is used on images of its own: from pictures to what it finds, and what is written of that."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from matchdistill.files import is_kind

PADDING = 3  # pixels around a text


class Found(ABC):
    """What a student finds in one image.

    Attributes:
        path: the file of the image.
    """

    path: str

    @abstractmethod
    def rows(self) -> list[list[str | float]]:
        """Its lines in a table with the columns of `Predicting.columns`."""

    @abstractmethod
    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """Its entries in a JSON file, as plain values.

        Args:
            image_id: the number of the image, for formats that number images.
        """

    @abstractmethod
    def drawn(self, image: Image.Image) -> Image.Image:
        """A copy of the image in RGB, with what was found drawn on it."""

    def mask(self) -> Image.Image:
        """What was found as a picture of numbers, one for each pixel of the image.

        Raises:
            ValueError: the task's students find no such thing.
        """
        raise ValueError("--masks is for students that give every pixel a class: leave it out")


class Predicting(ABC):
    """How a task's student sees pictures, and what it makes of them.

    Attributes:
        batch_size: images that the student sees at a time, unless the user says otherwise.
    """

    batch_size: ClassVar[int] = 32

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns of `Found.rows`."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """A picture in RGB as the student takes it, prepared as the validation images of its run were."""

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Raise a ValueError unless a network takes such images and gives what is expected."""

    @abstractmethod
    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> Sequence[Found]:
        """What a network in evaluation mode finds in prepared images, in their order."""


def label_names(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a config.json: numbers where it has none.

    Raises:
        ValueError: it has another number of names than classes.
    """
    count, names = config["num_classes"], config.get("label_names")
    if names is None:
        return [str(number) for number in range(count)]
    if not is_kind(names, list[str]) or len(names) != count:
        raise ValueError(f"label_names is not a list of {count} names, one for each class")
    return list(names)


def text_size(image: Image.Image) -> int:
    """The height in pixels of letters that can be read on an image."""
    return max(10, round(math.sqrt(image.width * image.height) / 28))


def write_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: str) -> None:
    """Write white text on a colored ground, from its left upper corner on."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = draw.textbbox(place, text, font)
    draw.rectangle((left - PADDING, top - PADDING, right + PADDING, bottom + PADDING), fill=color)
    draw.text(place, text, fill="white", font=font)

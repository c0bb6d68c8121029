"""What a network that gives every pixel a class finds in images.

Axes: C classes, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms import v2

from matchdistill.data.masks import runs_of
from matchdistill.data.segmentation import LARGEST_SIDE, normalised
from matchdistill.files import is_kind
from matchdistill.models import Preparation
from matchdistill.tasks.predicting import PADDING, Found, Predicting, label_names, text_size, write_text
from matchdistill.tasks.segmentation.colours import colours, overlay
from matchdistill.tasks.segmentation.outputs import Outputs, segment


@dataclass(frozen=True)
class Segmented(Found):
    """The classes of an image's pixels, the most frequent one first.

    Attributes:
        path: the file of the image.
        labels: names of the classes that it shows.
        numbers: of these.
        shares: of the image's pixels.
        count: number of classes of the network.
        png: the class of every pixel, as the bytes of a PNG.
    """

    path: str
    labels: list[str]
    numbers: list[int]
    shares: list[float]
    count: int
    png: bytes

    @property
    def values(self) -> NDArray[np.uint8]:
        """The class (H, W) of every pixel."""
        return np.asarray(self.mask())

    def mask(self) -> Image.Image:
        """The class of every pixel as a picture of numbers, with a palette."""
        return Image.open(io.BytesIO(self.png))

    def rows(self) -> list[list[str | float]]:
        """A line for each class."""
        each = zip(self.labels, self.shares, strict=True)
        return [[self.path, label, share] for label, share in each]

    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """An entry for each class, as COCO's results of stuff have them, with uncompressed run lengths."""
        values = self.values
        return [
            {
                "image_id": image_id,
                "file_name": self.path,
                "category_id": number,
                "category": label,
                "share": share,
                "segmentation": runs_of(values == number),
            }
            for number, label, share in zip(self.numbers, self.labels, self.shares, strict=True)
        ]

    def drawn(self, image: Image.Image) -> Image.Image:
        """The image under the colours of its classes, which are named at the top."""
        palette = colours(self.count)
        pixels = torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255
        painted = overlay(pixels, torch.from_numpy(self.values.copy()).long(), palette)
        canvas = Image.fromarray((painted.movedim(0, 2) * 255).round().byte().numpy())
        draw, size = ImageDraw.Draw(canvas), text_size(image)
        for line, (label, number) in enumerate(zip(self.labels, self.numbers, strict=True)):
            red, green, blue = (round(255 * part) for part in palette[number].tolist())
            place = (2.0 * PADDING, 2.0 * PADDING + line * (size + 3 * PADDING))
            write_text(draw, place, label, size, f"#{red:02x}{green:02x}{blue:02x}")
        return canvas


@dataclass(frozen=True)
class PixelPredicting(Predicting):
    """How a network that gives every pixel a class sees pictures.

    Attributes:
        names: of the classes.
        size: pixels of the shorter side that the network sees; None: as the picture has them.
        preparation: whose mean and deviation images get.
        top: the most classes that are named for an image; None: all that it shows.
    """

    batch_size: ClassVar[int] = 1  # pictures have sizes of their own

    names: list[str]
    size: int | None
    preparation: Preparation
    top: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], top: int | None = None) -> PixelPredicting:
        """As a config.json says it.

        Args:
            config: its values.
            top: the most classes that are named for an image; None: all.

        Raises:
            ValueError: it does not say how images are prepared.
        """
        size = config.get("size")
        if not is_kind(size, int | None) or not (size is None or 1 <= size <= LARGEST_SIDE):
            raise ValueError(f"size is {size!r}: expected pixels of the shorter side, or null")
        preparation = Preparation.of({name: config[name] for name in ("mean", "std") if name in config})
        return cls(label_names(config), size, preparation, top)

    @property
    def columns(self) -> list[str]:
        """Path, class, and its share of the pixels."""
        return ["path", "label", "share"]

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture as an image (3, H, W) of bytes, of its own size, to which what is found is brought back."""
        pixels: Tensor = v2.functional.pil_to_tensor(image)
        return pixels

    def check(self, network: nn.Module) -> None:
        """Nothing: the networks take images of any size."""

    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> list[Segmented]:
        """The classes of the pixels of each image."""
        return [self._segmented(network, path, image) for path, image in zip(paths, images, strict=True)]

    def _segmented(self, network: nn.Module, path: str, image: Tensor) -> Segmented:
        seen = image if self.size is None else v2.functional.resize(image, [self.size], antialias=True)
        logits = segment(network, normalised(seen, self.preparation)[None]).logits
        if logits.shape[1] != len(self.names):
            raise ValueError(f"it gives {logits.shape[1]} classes, but there are the names of {len(self.names)}")
        found = Outputs(logits.float()).resized((image.shape[1], image.shape[2])).logits.argmax(1)[0].cpu()
        counts = found.flatten().bincount(minlength=len(self.names))
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())][: self.top].tolist()
        picture = Image.fromarray(found.byte().numpy(), "P")
        picture.putpalette((colours(len(self.names)) * 255).round().byte().flatten().tolist())
        written = io.BytesIO()
        picture.save(written, "PNG")
        shares = [counts[number].item() / found.numel() for number in order]
        names = [self.names[number] for number in order]
        return Segmented(path, names, order, shares, len(self.names), written.getvalue())

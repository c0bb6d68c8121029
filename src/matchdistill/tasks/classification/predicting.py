"""What a classifier finds in images: the most probable classes.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from matchdistill.data.tensors import GrayImages, TensorDataset
from matchdistill.files import is_kind
from matchdistill.messages import cause
from matchdistill.models.preparation import LARGEST_IMAGE, Preparation
from matchdistill.tasks.classification.checks import check_classes
from matchdistill.tasks.predicting import PADDING, Found, Predicting, label_names, text_size

WORDS = {
    "input_size": list[int],
    "interpolation": str,
    "crop_pct": float,
    "crop_mode": str,
    "mean": list[float],
    "std": list[float],
}  # by which timm, and config.json, say how images are prepared


@dataclass(frozen=True)
class Classified(Found):
    """The most probable classes of an image.

    Attributes:
        path: the file of the image.
        labels: names of classes, the most probable one first.
        scores: their probabilities.
    """

    path: str
    labels: list[str]
    scores: list[float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """The probability of the most probable class."""
        return self.scores[0]

    def rows(self) -> list[list[str | float]]:
        """One line: the path, then label and score of each class."""
        pairs = zip(self.labels, self.scores, strict=True)
        return [[self.path, *(value for pair in pairs for value in pair)]]

    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """One entry: path, label and score, and all classes that were asked for."""
        several = [{"label": label, "score": score} for label, score in zip(self.labels, self.scores, strict=True)]
        top = {"top": several} if len(several) > 1 else {}
        return [{"path": self.path, "label": self.label, "score": self.score, **top}]

    def drawn(self, image: Image.Image) -> Image.Image:
        """The image above a caption: a line for each class."""
        text = "\n".join(f"{label} {score:.0%}" for label, score in zip(self.labels, self.scores, strict=True))
        font = ImageFont.load_default(text_size(image))
        box = ImageDraw.Draw(image).multiline_textbbox((PADDING, PADDING), text, font)
        width, height = (int(end) + PADDING + 1 for end in box[2:])
        canvas = Image.new("RGB", (max(image.width, width), image.height + height))
        canvas.paste(image)
        ImageDraw.Draw(canvas).multiline_text((PADDING, image.height + PADDING), text, "white", font)
        return canvas


@dataclass(frozen=True)
class ClassPredicting(Predicting):
    """How a classifier sees pictures.

    Attributes:
        names: of the classes.
        image_size: height and width in pixels of what it takes.
        gray: whether pictures are made gray and resized whole, as the small sets of gray images are.
        preparation: whose mean and deviation these get.
        transform: prepares other pictures.
        top: how many classes are named.
    """

    names: list[str]
    image_size: int
    gray: bool
    preparation: Preparation
    transform: Callable[[Image.Image], Tensor]
    top: int

    @classmethod
    def of(cls, config: Mapping[str, Any], top: int | None = None) -> ClassPredicting:
        """As a config.json says it.

        Args:
            config: its values.
            top: how many classes are named; None: one.

        Raises:
            ValueError: they do not say how images are prepared.
        """
        from timm.data.transforms_factory import create_transform

        names, words = label_names(config), dict(config.get("pretrained_cfg", config))
        if not is_kind(words, WORDS) or len(words["input_size"]) != 3 or not words["crop_pct"] > 0:
            raise ValueError(f"it does not say how images are prepared: expected {', '.join(WORDS)}")
        channels, height, width = words["input_size"]
        if channels != 3 or height != width or not 1 <= height <= LARGEST_IMAGE:
            raise ValueError(f"input_size is {words['input_size']}: expected square images of three channels")
        try:
            preparation = Preparation.of({word: words[word] for word in WORDS if word != "input_size"})
            transform = create_transform(**{word: words[word] for word in WORDS})
        except Exception as error:  # a word that timm does not know
            raise ValueError(f"images cannot be prepared as it says ({cause(error)})") from error
        return cls(names, height, config.get("gray") is True, preparation, transform, min(top or 1, len(names)))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def columns(self) -> list[str]:
        """Path, label and score, and label_2, score_2 and so on for further classes."""
        further = [f"{name}_{number}" for number in range(2, self.top + 1) for name in ("label", "score")]
        return ["path", "label", "score", *further]

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture as an image (3, H, W)."""
        if not self.gray:
            return self.transform(image)
        pixels = torch.from_numpy(np.array(image.convert("L")))[None]
        whole = GrayImages(pixels, torch.zeros(1, dtype=torch.int64)).resized(self.image_size)
        return TensorDataset(whole, preparation=self.preparation)[0][0]

    def check(self, network: nn.Module) -> None:
        """Raise a ValueError unless a network maps the images to one logit per class."""
        check_classes(network, self, "student")

    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> list[Classified]:
        """The most probable classes of each image."""
        scores, labels = network(torch.stack(images)).float().softmax(1).topk(self.top)
        each = zip(paths, labels.tolist(), scores.tolist(), strict=True)
        return [Classified(path, [self.names[at] for at in own], cast("list[float]", best)) for path, own, best in each]

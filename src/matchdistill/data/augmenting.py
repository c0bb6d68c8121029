"""How training images are varied beyond crops, shifts and mirroring.

Axes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from matchdistill.data.module import DataOptions, Sources
from matchdistill.messages import number, whole

Policy = Literal["randaugment", "autoaugment", "trivialaugment", "three-augment"]
FILL = [124, 116, 104]  # ImageNet's mean, which comes in at the edges
WHOLE_CROP = [0.08, 1.0]  # torchvision's
STRENGTH, MOST_STRENGTH = 9, 30


@dataclass(kw_only=True)
class AugmentingOptions(DataOptions):
    """The options of images that are varied.

    Args:
        augmentation: how images are varied further: ``randaugment``, ``autoaugment`` (ImageNet's policy),
            ``trivialaugment`` as torchvision has them; ``three-augment``: gray, solarised or blurred (DeiT III). null: not.
        augmentation_strength: of ``randaugment``, from 0 to 30; null: 9.
        color_jitter: the most by which brightness, contrast and saturation change, as a share; 0: they do not.
        random_erasing: the share of images a rectangle of which is erased.
        crop_scale: [least, most] share of an image's area that a random crop has; null: [0.08, 1].
    """

    sources: ClassVar[Sources] = {
        "torchvision": ("augmentation", "augmentation_strength", "color_jitter", "random_erasing", "crop_scale")
    }

    augmentation: Policy | None = None
    augmentation_strength: int | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    crop_scale: list[float] | None = None

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        if self.augmentation not in (None, *get_args(Policy)):
            yield f"{prefix}.augmentation is {self.augmentation!r}: expected {', '.join(get_args(Policy))}"
        yield from whole(f"{prefix}.augmentation_strength", self.augmentation_strength, 0, MOST_STRENGTH)
        if self.augmentation_strength is not None and self.augmentation != "randaugment":
            yield f"{prefix}.augmentation_strength is of randaugment: give it as {prefix}.augmentation, or no strength"
        yield from number(f"{prefix}.color_jitter", self.color_jitter, 0, below=1)
        if not 0 <= self.random_erasing <= 1:
            yield f"{prefix}.random_erasing is {self.random_erasing}: expected a share from 0 to 1"
        if (scale := self.crop_scale) is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            yield f"{prefix}.crop_scale is {scale}: expected two shares [least, most] above 0, for example [0.25, 1]"
        yield from super().problems(prefix)


@dataclass(frozen=True)
class Variation:
    """What is done to training images.

    Attributes:
        crop_scale: share of an image's area that a random crop has.
        pixels: transforms of an image in 0..255, (3, H, W) uint8 or of PIL, before it is normalised.
        values: transforms of a normalised image (3, H, W).
    """

    crop_scale: tuple[float, ...] = tuple(WHOLE_CROP)
    pixels: tuple[Callable[[Any], Any], ...] = ()
    values: tuple[Callable[[Tensor], Tensor], ...] = ()

    def of_pixels(self, images: Tensor) -> Tensor:
        """Gray images (N, H, W) uint8, each varied on its own, as (N, 3, H, W); (N, 1, H, W) where nothing varies them."""
        if not self.pixels:
            return images[:, None]
        return torch.stack([_each(self.pixels, image.expand(3, -1, -1)) for image in images])

    def of_values(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W), each varied on its own."""
        return torch.stack([_each(self.values, image) for image in images]) if self.values else images


def _each(transforms: tuple[Callable[[Any], Any], ...], image: Tensor) -> Tensor:
    for transform in transforms:
        image = transform(image)
    return image


PLAIN = Variation()


def variation(options: AugmentingOptions) -> Variation:
    """What the options say is done to training images; all of it draws from torch's random numbers."""
    from torchvision.transforms import v2

    drawn: dict[str, Any] = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": FILL}
    policies: dict[str, Callable[[], Any]] = {
        "randaugment": lambda: v2.RandAugment(
            magnitude=STRENGTH if options.augmentation_strength is None else options.augmentation_strength, **drawn
        ),
        "autoaugment": lambda: v2.AutoAugment(**drawn),
        "trivialaugment": lambda: v2.TrivialAugmentWide(**drawn),
        "three-augment": lambda: v2.RandomChoice(
            [v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(9, (0.1, 2.0))]
        ),
    }
    pixels = [] if options.augmentation is None else [policies[options.augmentation]()]
    if jitter := options.color_jitter:
        pixels.append(v2.ColorJitter(jitter, jitter, jitter))
    values = [v2.RandomErasing(options.random_erasing)] if options.random_erasing else []
    return Variation(tuple(options.crop_scale or WHOLE_CROP), tuple(pixels), tuple(values))

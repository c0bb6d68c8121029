"""How a network wants its images: their values, and what of a picture it sees.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.files import is_kind
from matchdistill.messages import did_you_mean, number, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LARGEST_IMAGE = 8192  # pixels of its sides: of larger ones a batch alone fills the memory
SCALE, SHIFT = "preparation_scale", "preparation_shift"  # buffers, (C, 1, 1)


@dataclass(frozen=True)
class Preparation:
    """How images are made ready for a network, in timm's words. The defaults are the usual ones of ImageNet.

    Attributes:
        mean: of each of the three channels, whose values are from 0 to 1.
        std: their standard deviations, by which they are divided.
        interpolation: by which images are resized: bilinear, bicubic, nearest, box, hamming or lanczos.
        crop_pct: the share of a validation image's side that the network sees.
        crop_mode: center: the shorter side is resized, and the middle taken; squash: both sides are resized, whatever their
            ratio; border: the longer side is resized, and what is missing has the mean's color.
        size: height and width in pixels that the network is made for; None: it takes any, or that is not known. Of a
            student ``data.image_size``, where that is given, counts instead.

    Examples:
        >>> Preparation(crop_pct=0.9).uncropped(224), Preparation().uncropped(224)
        (248, 256)
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    size: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Preparation:
        """The preparation of plain values; what they leave out is ImageNet's.

        Raises:
            ValueError: in one line, what is wrong with the values.
        """
        if problems := list(preparation_problems("preparation", values or {})):
            raise ValueError("; ".join(problems))
        given: dict[str, Any] = {
            name: tuple(map(float, each)) if name in ("mean", "std") else each for name, each in (values or {}).items()
        }
        return cls(**given)

    def plain(self) -> dict[str, Any]:
        """As plain values, for recipes and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def usual(self) -> bool:
        """Whether it is ImageNet's, at its usual size if at any."""
        return replace(self, size=None) == IMAGENET and self.size in (None, IMAGENET_SIZE)

    def uncropped(self, size: int) -> int:
        """Pixels of the side that an image is resized to before its middle of that size is taken."""
        # ImageNet's 256 of 224 has been rounded to the nearest here from the beginning; timm rounds down.
        exact = size / self.crop_pct
        return round(exact) if self.crop_pct == IMAGENET.crop_pct else math.floor(exact + 1e-6)

    def words(self, image_size: int) -> dict[str, Any]:
        """As config.json has it for images of a size, so that timm prepares them to the same pixels.

        Examples:
            >>> words = Preparation().words(224)
            >>> words["input_size"], words["crop_pct"]
            ([3, 224, 224], 0.875)
        """
        # Rounded down: timm rounds the quotient down, which gives the same pixels then.
        share = math.floor(1e4 * image_size / self.uncropped(image_size)) / 1e4
        own = {name: value for name, value in self.plain().items() if name != "size"}
        return {"input_size": [3, image_size, image_size], **own, "crop_pct": share}

    def cut(self, size: int) -> list[Callable[[Any], Any]]:
        """The transforms of a PIL image by which a network of a size sees it in validation."""
        from torchvision.transforms import v2

        resized = self.uncropped(size)
        interpolation = v2.InterpolationMode(self.interpolation)
        if self.crop_mode == "border":
            from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio

            mean = [round(255 * value) for value in self.mean]
            longer = ResizeKeepRatio(resized, longest=1.0, interpolation=self.interpolation)  # type: ignore[no-untyped-call]
            return [longer, CenterCropOrPad(size, fill=(mean[0], mean[1], mean[2]))]
        both = (resized, resized) if self.crop_mode == "squash" else resized
        return [v2.Resize(both, interpolation), v2.CenterCrop(size)]

    def pixels(self, images: Tensor) -> Tensor:
        """Prepared images (N, 3, H, W) with their values from 0 to 1 again."""
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return images * deviation + mean

    def __str__(self) -> str:
        size = "" if self.size is None else f", {self.size} px"
        return f"{self.normalised}, {self.interpolation}, crop_pct {self.crop_pct:.4g} ({self.crop_mode}){size}"

    @property
    def normalised(self) -> str:
        """Mean and deviation in words."""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, deviation {std}"


IMAGENET = Preparation()


def preparation_problems(prefix: str, values: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with the values of a preparation."""
    known = [field.name for field in fields(Preparation)]
    for name in values:
        if name not in known:
            yield f"{prefix} has no {name!r}{did_you_mean(str(name), known)}: expected {', '.join(known)}"
    for name in ("mean", "std"):
        if name not in values:
            continue
        given = values[name]
        if not is_kind(list(given) if isinstance(given, tuple) else given, list[float]) or len(given) != 3:
            yield f"{prefix}.{name} is {given!r}: expected three numbers, of values from 0 to 1"
        elif name == "std" and not all(0 < value < math.inf for value in given):
            yield f"{prefix}.std is {given!r}: expected three numbers above 0"
        elif not all(math.isfinite(value) for value in given):
            yield f"{prefix}.mean is {given!r}: expected three finite numbers"
        elif max(abs(value) for value in given) > 2:
            yield f"{prefix}.{name} is {given!r}: expected numbers of values from 0 to 1, divide them by 255"
    for name, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if name in values and values[name] not in choices:
            hint = did_you_mean(str(values[name]), choices)
            yield f"{prefix}.{name} is {values[name]!r}{hint}: expected one of {', '.join(choices)}"
    if "crop_pct" in values:
        if not is_kind(values["crop_pct"], float):
            yield f"{prefix}.crop_pct is {values['crop_pct']!r}: expected a share of the image's side"
        else:
            yield from number(f"{prefix}.crop_pct", values["crop_pct"], 0, above=True)
            if values["crop_pct"] > 1 and values.get("crop_mode") != "border":
                yield f"{prefix}.crop_pct is {values['crop_pct']}: expected a share of at most 1"
    if (size := values.get("size")) is not None:
        if not is_kind(size, int):
            yield f"{prefix}.size is {size!r}: expected a number of pixels"
        else:
            yield from whole(f"{prefix}.size", size, 1, LARGEST_IMAGE)


class _Converting:
    """Gives a network its images as it wants them; a class, so that it can be copied and pickled along with the network."""

    def __init__(self, values: bool, size: int | None, mode: str) -> None:
        self.values, self.size, self.mode = values, size, mode

    def __call__(self, module: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            return None
        images = args[0]
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode=self.mode, antialias=True)
        if self.values:
            images = torch.addcmul(getattr(module, SHIFT), images, getattr(module, SCALE))
        return images, *args[1:]


def convert_images(network: nn.Module, given: Preparation, wanted: Preparation) -> None:
    """Have a network take images (N, C, H, W) that are prepared for another one: it sees the same pixels, its own way.

    A hook normalises them anew, by one fused operation, and resizes them where the network wants a size. Nothing is done
    where there is nothing to do. The network's weights, modules and state stay as they are.

    Args:
        network: takes images as its first argument.
        given: how the images will be prepared; its ``size``: theirs.
        wanted: how the network wants them; its ``size``: None takes them as they come.
    """
    size = None if wanted.size == given.size else wanted.size
    values = (given.mean, given.std) != (wanted.mean, wanted.std)
    if not values and size is None:
        return
    like = next((weight for weight in network.parameters() if weight.is_floating_point()), torch.empty(0))
    means, stds = (
        torch.tensor(pair, dtype=torch.float64) for pair in ((given.mean, wanted.mean), (given.std, wanted.std))
    )
    if values:
        for name, value in ((SCALE, stds[0] / stds[1]), (SHIFT, (means[0] - means[1]) / stds[1])):
            network.register_buffer(name, value.float().to(like.device)[:, None, None], persistent=False)
    mode = "bicubic" if wanted.interpolation == "bicubic" else "bilinear"
    network.register_forward_pre_hook(_Converting(values, size, mode))

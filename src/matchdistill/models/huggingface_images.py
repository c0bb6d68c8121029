"""How image processors of Hugging Face transformers prepare images, found by asking them.

An image processor is any code, and what its attributes mean differs from one to the next. So it is run on a few small
pictures: their colors say what it does to values, and their ramps say what it sees of a picture. What a `Preparation` cannot
say is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from matchdistill.files import path_of
from matchdistill.messages import cause
from matchdistill.models.preparation import Preparation

PROCESSOR = "preprocessor_config.json"  # beside a config.json, of the image processor
RESAMPLING = (
    "nearest",
    "lanczos",
    "bilinear",
    "bicubic",
    "box",
    "hamming",
)  # by the numbers that image processors have
COLORS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
SIDES = (80, 240)  # of pictures; their middle is the same however halves of pixels are rounded
CLOSE = 0.01  # of values from 0 to 1: two ways of interpolating ramps differ by less, two ways of cutting by more
FAMILY = {
    "rt_detr_v2": "rt_detr",
    "d_fine": "rt_detr",
    "dab-detr": "conditional_detr",
}  # types whose image processors transformers does not list, and a type that has the same


class Values(NamedTuple):
    """What an image processor does to the values of images.

    Attributes:
        mean: of each channel, red first, whose values are from 0 to 1.
        std: their standard deviations, by which they are divided.
        reversed: whether its channels are blue, green and red.
    """

    mean: list[float]
    std: list[float]
    reversed: bool


def harmless(entry: str) -> dict[str, Any]:
    """How a name is looked up: code that comes with it is not run, and of a folder nothing is looked for on the Hub."""
    return {"trust_remote_code": False, "local_files_only": path_of(entry).is_dir()}


def load_processor(entry: str) -> Any:
    """The image processor of a folder or a name of the Hub; None where it has none.

    Raises:
        ValueError: the folder has one that cannot be built.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(entry, **harmless(entry))  # type: ignore[no-untyped-call]
    except (ImportError, OSError, ValueError) as error:
        if (file := path_of(entry) / PROCESSOR).is_file():
            raise ValueError(f"the image processor of {file} cannot be built ({cause(error)})") from error
        return None


def processor_of(entry: str, config: Any) -> Any:
    """The image processor of a folder or a name of the Hub; where it has none, the usual one of its type.

    Raises:
        ValueError: the type has none.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if entry != config.model_type and (own := load_processor(entry)) is not None:
        return own
    family = FAMILY.get(config.model_type)
    known: Any = IMAGE_PROCESSOR_MAPPING.get(type(config) if family is None else CONFIG_MAPPING[family], None)
    kinds = list(known.values()) if isinstance(known, dict) else list(known or ())
    kind = known.get("torchvision") if isinstance(known, dict) else None
    kind = kind or next((each for each in reversed(kinds) if each is not None), None)
    if kind is None:
        raise ValueError(
            f"model 'transformers:{entry}' has no image processor: name a folder or a model of the Hub with a {PROCESSOR}"
        )
    return kind()


def processor_values(processor: Any, **options: Any) -> Values:
    """What an image processor does to the values of images, from pictures of one color each.

    Args:
        processor: of transformers.
        options: what it is called with, such as ``do_resize=False``.

    Raises:
        ValueError: in half a sentence, what it does to them that is no mean and deviation of each channel.
    """
    middles = []
    for color in COLORS:
        pixels = _pixels(processor, Image.new("RGB", (SIDES[0], SIDES[0]), color), **options)
        middles.append(pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].double())
    dark, response = middles[0], torch.stack(middles[1:]) - middles[0]  # (color, channel)
    reversed_ = bool(response.diagonal().abs().sum() < response.flip(1).diagonal().abs().sum())
    if reversed_:
        dark, response = dark.flip(0), response.flip(1)
    own = response.diagonal()
    if own.min() <= 0 or (response - own.diag()).abs().max() > 1e-4 * own.max():
        raise ValueError("mixes the colors of an image")
    written = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    mean, std = (_as_written(*pair) for pair in zip((-dark / own, 1 / own), written, strict=True))
    return Values(mean, std, reversed_)


def _as_written(found: Tensor, written: Any) -> list[float]:
    """Numbers that are found by measuring, without its errors where the image processor has the same."""
    if isinstance(written, list | tuple) and len(written) == len(found):
        exact = [float(value) for value in written]
        if torch.allclose(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=1e-6):
            return exact
    return [float(f"{value:.6g}") + 0.0 for value in found.tolist()]


def processor_cut(processor: Any, values: Values) -> dict[str, Any]:
    """What of a picture an image processor sees, as fields of a `Preparation`, held to it on a wide and a high picture.

    Args:
        processor: of transformers.
        values: what it does to values.

    Raises:
        ValueError: in half a sentence, how it differs from all that a `Preparation` can say.
    """
    from torchvision.transforms import v2

    pictures = [_ramps(*SIDES), _ramps(*reversed(SIDES))]
    mean, std = (torch.tensor(each)[:, None, None] for each in (values.mean, values.std))
    theirs = [_pixels(processor, picture) for picture in pictures]
    shapes = {tuple(each.shape[1:]) for each in theirs}
    size = theirs[0].shape[1]
    if shapes != {(size, size)}:
        shown = " and ".join(f"{height}x{width}" for height, width in sorted(shapes))
        raise ValueError(f"makes images of {shown} px of a high and a wide picture, not squares of one size")
    theirs = [(each.flip(0) if values.reversed else each) * std + mean for each in theirs]
    found: dict[float, dict[str, Any]] = {}
    for fields in _guesses(processor, size):
        steps = v2.Compose([*Preparation.of(fields).cut(size), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
        apart = [
            (steps(picture) - each).abs().mean((1, 2)).max() for picture, each in zip(pictures, theirs, strict=True)
        ]
        found.setdefault(float(max(apart)), fields)
    nearest = min(found)
    if nearest > CLOSE:
        raise ValueError(
            f"cuts images to {size} px in a way of its own: the nearest crop differs by {nearest:.2g}, of values up to 1"
        )
    return found[nearest]


def interpolation_of(processor: Any) -> dict[str, Any]:
    """By which an image processor resizes images, as a field of a `Preparation`."""
    resampling = getattr(processor, "resample", None)
    return {} if resampling is None else {"interpolation": RESAMPLING[int(resampling)]}


def _guesses(processor: Any, size: int) -> Iterator[dict[str, Any]]:
    """What an image processor with images of a size may see of a picture, by the numbers that processors have."""
    edges, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    # Perceiver's image processor says by its crop how large an image would be of which it takes the middle.
    named = (
        edges.get("shortest_edge"),
        edges.get("height"),
        crop.get("height"),
        getattr(processor, "resize_short", None),
    )
    sides = {size, *named}
    if (edge := edges.get("shortest_edge")) is not None:
        sides.add(int(256 / 224 * edge))  # LeViT's
        if (share := getattr(processor, "crop_pct", None)) is not None:  # ConvNeXt's: larger first, then the middle
            sides.add(int(edge / share))
    for side in sorted(each for each in sides if each is not None and each >= size):
        for mode in ("squash", "center"):
            yield {**interpolation_of(processor), "size": size, "crop_pct": size / side, "crop_mode": mode}


def _ramps(width: int, height: int) -> Image.Image:
    """A picture whose red goes from left to right, whose green from top to bottom, and whose blue along both."""
    across = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    pixels = torch.stack([across, down, (across + down) / 2], dim=2).round().byte()
    return Image.fromarray(pixels.numpy())


def _pixels(processor: Any, picture: Image.Image, **options: Any) -> Tensor:
    """A picture (3, H, W) as an image processor prepares it."""
    try:
        found = processor(images=picture, return_tensors="pt", **options)["pixel_values"]
    except Exception as error:  # each fails in a way of its own
        raise ValueError(f"gives no pixels, it fails with {cause(error)}") from error
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[:2] != (1, 3):
        raise ValueError("gives something else than an image of three channels")
    return found[0].float()

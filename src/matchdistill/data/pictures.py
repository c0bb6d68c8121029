"""The one reader of image files, for all data sets and tasks: a file becomes an upright picture in RGB of 8 bits.

The rules, which the page on data has as a table: what lies in a file of a type of `FORMATS` is converted by Pillow; the
first picture counts where there are several; transparency is left out; values of more than 8 bits are scaled so that
`WHITES` become 255; and the picture is turned upright as its EXIF orientation says. PIL images and
tensors are read by the same rules.

Axes: H height, W width.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from matchdistill.files import open_file
from matchdistill.messages import cause, printable

# Of Pillow's, without documents and drawings, for some of which it starts other programs.
FORMATS = tuple(
    "AVIF BMP DDS DIB GIF ICO JPEG JPEG2000 MPO MSP PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP XBM XPM".split()
)
IMAGE_SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
READERS = [form for form in FORMATS if form in Image.OPEN]  # some are another's variants

WHITES = {"I": 65535.0, "F": 1.0}  # of whole numbers of 16 and 32 bits, and of floating-point numbers
DARK = 16  # a picture that does not reach a share of 1 / DARK of white is probably of another range

ORIENTATION, PHOTOMETRIC = 274, 262  # tags of EXIF and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Stored(Protocol):
    """An image that is no file of its own. Messages call it by its ``str()``."""

    def open(self) -> BinaryIO | Image.Image | Tensor:
        """The content of an image file, or the image itself."""


Place = str | Stored  # where an image is: a path, or something that opens it


class Picture(NamedTuple):
    """What a file shows.

    Attributes:
        image: in RGB, upright.
        orientation: of the file by EXIF, 1 to 8: from 5 on width and height of what is stored are exchanged.
    """

    image: Image.Image
    orientation: int = 1


def read_picture(place: Place | Path, white: float | None = None, max_pixels: int | None = None) -> Picture:
    """Read an image.

    Args:
        place: an image file, or what opens one.
        white: the value that becomes white in pictures of more than 8 bits; None: as in `WHITES`.
        max_pixels: the most pixels of a picture; None: Pillow's limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        Exception: the file is no image, or a damaged one, in all the ways in which Pillow says so.
    """
    content = open_file(place) if isinstance(place, str | Path) else place.open()
    if isinstance(content, Tensor):
        return Picture(_of_tensor(content, white))
    if isinstance(content, Image.Image):  # which is not closed: its owner may keep it
        return _picture(content, white, max_pixels)
    with content as stream, _allowed(max_pixels), Image.open(stream, formats=READERS) as file:
        return _picture(file, white, max_pixels)


def unreadable(path: str, error: BaseException) -> str:
    """What is said of an image file by the error of `read_picture`."""
    if isinstance(error, UnidentifiedImageError):  # whose own words are of the stream that Pillow was given
        return f"image {printable(path)} is not an image that Pillow can read"
    return f"image {printable(path)} cannot be read ({cause(error)})"


def _picture(file: Image.Image, white: float | None, max_pixels: int | None) -> Picture:
    if max_pixels is not None and file.width * file.height > max_pixels:
        raise ValueError(f"it has {file.width * file.height} pixels, more than data.max_pixels, {max_pixels}")
    stored = _orientation(file)
    file.load()
    left = _orientation(file)  # Pillow turns some types by itself as it loads them
    image = _in_rgb(file, white)
    return Picture(image.transpose(UPRIGHT[left]) if left in UPRIGHT else image, stored if stored in UPRIGHT else left)


def _of_tensor(values: Tensor, white: float | None) -> Image.Image:
    """The picture of a tensor (H, W) or (C, H, W) of bytes, of larger whole numbers or of floating-point numbers.

    Raises:
        ValueError: it has another shape, or values that are out of range.
    """
    channels = values[None] if values.ndim == 2 else values
    if channels.ndim != 3 or len(channels) not in (1, 3, 4) or not channels.numel():
        raise ValueError(
            f"expected a tensor (channels, height, width) with 1, 3 or 4 channels, got {tuple(values.shape)}"
        )
    channels = channels.detach().cpu().movedim(0, 2)
    if channels.dtype != torch.uint8:
        whole = not (channels.is_floating_point() or channels.dtype == torch.bool)
        channels = torch.from_numpy(
            _scaled(
                channels.to(torch.int64 if whole else torch.float32).numpy(),
                WHITES["I" if whole else "F"] if white is None else white,
            )
        )
    pixels = channels[..., 0] if channels.shape[2] == 1 else channels[..., :3]
    return Image.fromarray(pixels.contiguous().numpy()).convert("RGB")


@contextlib.contextmanager
def _allowed(max_pixels: int | None) -> Iterator[None]:
    """Pillow's own limit out of the way where there is another one."""
    before = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{str(error).rstrip(chr(46))}: if it is not one, allow so many by --data.max_pixels"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _orientation(file: Image.Image) -> int:
    try:
        found = file.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged notes of a camera say nothing about the picture
        return 1
    return found if found in UPRIGHT else 1


def _in_rgb(file: Image.Image, white: float | None) -> Image.Image:
    kind = file.mode.partition(";")[0]
    if kind not in WHITES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that transparency is lost
            return file.convert("RGB")
    values = np.asarray(file)
    scaled = _scaled(values, WHITES[kind] if white is None else white)
    if getattr(file, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits alone
        scaled = 255 - scaled
    return Image.fromarray(scaled).convert("RGB")


def _scaled(values: NDArray[Any], white: float) -> NDArray[np.uint8]:
    """Values (H, W) from 0 to white as bytes.

    Raises:
        ValueError: there are others.
    """
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= white):  # nor is NaN
        raise ValueError(
            f"its values run from {least:g} to {most:g}: expected 0 to {white:g}, or the value of white as data.white"
        )
    if 0 < most * DARK < white:
        warnings.warn(
            f"an image of more than 8 bits has values up to {most:g} and is nearly black, as white is {white:g}: if its "
            f"sensor ends before, give the value of white as data.white, for example {_likely(most, white):g}",
            stacklevel=2,
        )
    return np.asarray((values * (255 / white)).round(), np.uint8)


def _likely(most: float, white: float) -> float:
    """The largest number of some bits that is not below a value; of shares the value itself."""
    return most if white <= 1 else float(2 ** int(most).bit_length() - 1)

"""Masks with a class for every pixel, as data sets store them: PNGs of numbers, panoptic PNGs, and drawn objects.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from matchdistill.data.coco import LYING, CocoImages
from matchdistill.data.pictures import ORIENTATION, READERS, UPRIGHT
from matchdistill.files import open_file
from matchdistill.messages import cause, printable

IGNORED, PADDED = -1, -2  # labels: of pixels that count nowhere, and of padding
UNKNOWN = -3
VOID = 255  # in masks: a pixel of no class
MOST_CLASSES = 255
NAMED = 3  # bad masks in an error

Values = NDArray[np.int16]


def lookup(labels: dict[int, int], ignore: Sequence[int] = ()) -> Values:
    """Labels (256,) by the values of a mask.

    Args:
        labels: by value.
        ignore: further values that are ignored, as `VOID` is.

    Examples:
        >>> lookup({0: 0, 7: 1}, ignore=[0])[[0, 7, 8, 255]].tolist()
        [-1, 1, -3, -1]
    """
    found = np.full(256, UNKNOWN, np.int16)
    found[list(labels)] = list(labels.values())
    found[[VOID, *ignore]] = IGNORED
    return found


@dataclass(frozen=True)
class PixelMasks(ABC):
    """The masks of N images.

    Attributes:
        paths: what they are called in messages: their files, or the images' where they have none.
        labels: (256,) of their values, from `lookup`.
    """

    paths: list[str]
    labels: Values

    @abstractmethod
    def values(self, index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of an image as it is stored.

        Raises:
            Exception: it cannot be read, in all ways in which Pillow says so.
        """

    def subset(self, index: Tensor) -> PixelMasks:
        """The masks of ``index`` (M,)."""
        return replace(self, paths=[self.paths[i] for i in index.tolist()])

    def read(self, index: int, size: tuple[int, int] | None = None, orientation: int = 1) -> Values:
        """The labels (H, W) of an image.

        Args:
            index: its number.
            size: width and height of the image, upright; None: they are not compared.
            orientation: of its file by EXIF. The mask of a picture that is stored on its side may be of what is stored: it
                is then turned as the picture was.

        Raises:
            ValueError: in one line, that the mask cannot be read, is of another size or has unknown values.
        """
        try:
            values = self.values(index)
            found: Values = self.labels[values]
            if (unknown := np.unique(values[found == UNKNOWN])).size:
                known = np.flatnonzero(self.labels != UNKNOWN)
                several = len(unknown) > 1
                raise ValueError(
                    f"it has the value{'s' * several} {', '.join(map(str, unknown[:5]))}, which "
                    f"{'are no classes' if several else 'is no class'}: expected {_ranges(known.tolist())}; name the class, "
                    "or add the value to data.ignore"
                )
            if size is not None and found.shape != size[::-1] and orientation in LYING and found.shape == size:
                found = np.asarray(Image.fromarray(found.astype(np.int32)).transpose(UPRIGHT[orientation]), np.int16)
            if size is not None and found.shape != size[::-1]:
                raise ValueError(f"it has {found.shape[1]} x {found.shape[0]} pixels, its image {size[0]} x {size[1]}")
        except Exception as error:  # Pillow's readers fail in every way on damaged files
            said = str(error) if isinstance(error, ValueError) else cause(error)
            raise ValueError(f"mask {printable(self.paths[index])} cannot be used: {said}") from error
        return found


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in ascending order, in few words.

    Examples:
        >>> _ranges([0, 1, 2, 7, 255])
        '0 to 2, 7, 255'
    """
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in ends)


def _identified(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=READERS)
    except UnidentifiedImageError as error:  # whose own words are of the stream
        raise ValueError("it is not an image that Pillow can read") from error


def _opened(path: str) -> Image.Image:
    with open_file(path) as stream, _identified(stream) as file:
        if file.format != "PNG":
            raise ValueError(f"it is of type {file.format}: expected a PNG, which keeps every value")
        file.load()
        return file


@dataclass(frozen=True)
class PngMasks(PixelMasks):
    """PNGs in gray or with a palette, whose numbers are the values."""

    def values(self, index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of an image as it is stored."""
        file = _opened(self.paths[index])
        if file.mode not in ("L", "P", "1", "I", "I;16"):
            raise ValueError(
                f"it is in colours ({file.mode}): expected a number for every pixel, in gray or with a palette"
            )
        values = np.asarray(file)
        if values.max(initial=0) > VOID:
            raise ValueError(f"it has values up to {values.max()}: expected 0 to {VOID}")
        return values.astype(np.uint8)


@dataclass(frozen=True)
class PanopticMasks(PixelMasks):
    """COCO's panoptic PNGs: colours that are numbers of segments, each of a class.

    Attributes:
        segments: numbers of the segments of all images, one after another.
        kinds: their values.
        ends: (N,) where the segments of each image end.
        begins: (N,) where they begin.
    """

    segments: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    def subset(self, index: Tensor) -> PixelMasks:
        """The masks of ``index`` (M,)."""
        paths = [self.paths[i] for i in index.tolist()]
        return replace(self, paths=paths, begins=self.begins[index.numpy()], ends=self.ends[index.numpy()])

    def values(self, index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of an image; `VOID` where no segment is."""
        file = _opened(self.paths[index])
        if file.mode != "RGB":
            raise ValueError(f"it is of mode {file.mode}: expected colours (RGB), which are numbers of segments")
        numbers = np.asarray(file).astype(np.int64) @ np.array([1, 256, 256**2])
        rows = slice(self.begins[index], self.ends[index])
        known, kinds = np.append(self.segments[rows], 0), np.append(self.kinds[rows], np.uint8(VOID))
        order = known.argsort(kind="stable")
        places = np.searchsorted(known[order], numbers).clip(max=len(known) - 1)
        if (strange := numbers[known[order][places] != numbers]).size:
            raise ValueError(f"it shows the segment {strange[0]}, which the annotations do not have")
        values: NDArray[np.uint8] = kinds[order][places]
        return values


@dataclass(frozen=True)
class DrawnMasks(PixelMasks):
    """Objects with masks, drawn: 0 is what is behind them all, then their labels; objects of two classes leave `VOID`.

    Attributes:
        images: the images with their objects.
    """

    images: CocoImages

    def subset(self, index: Tensor) -> PixelMasks:
        """The masks of ``index`` (M,)."""
        return replace(self, paths=[self.paths[i] for i in index.tolist()], images=self.images.subset(index))

    def values(self, index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of an image."""
        notes, (height, width) = self.images.annotations, self.images.sizes[index].tolist()
        first, last = self.images.rows[index].tolist()
        drawn, shared = np.zeros((height, width), np.uint8), np.zeros((height, width), bool)
        for row in range(first, last):
            inside, label = notes.mask(row, height, width).numpy() > 0, int(notes.labels[row])
            shared |= inside & (drawn != 0) & (drawn != label)
            drawn[inside] = label
        drawn[shared] = VOID
        return drawn


def check_masks(paths: Sequence[str], masks: PixelMasks, part: str) -> None:
    """Read all masks, and the heads of their images, in several threads.

    Args:
        paths: the images.
        masks: their masks.
        part: what the images are called in messages, "training" or "validation".

    Raises:
        ValueError: in one line, how many cannot be used, and the first ones; or that no mask has a pixel that counts.
    """

    def problem(index: int) -> str | bool:
        """What is wrong with a mask; else whether it has a pixel that counts."""
        try:
            return bool((masks.read(index, *_shown_as(paths[index])) >= 0).any())
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        found = list(threads.map(problem, range(len(paths))))
    problems = [each for each in found if isinstance(each, str)]
    if problems:
        more = f"; and {len(problems) - NAMED} more of {len(paths)}" if len(problems) > NAMED else ""
        raise ValueError("; ".join(problems[:NAMED]) + more)
    if found and not any(found):
        raise ValueError(
            f"no pixel of the {part} masks ({masks.paths[0]} and so on) is of a class that counts, as all are {VOID} or in "
            "data.ignore: give masks with classes, or take their values out of data.ignore"
        )


def _shown_as(path: str | Path) -> tuple[tuple[int, int] | None, int]:
    """Width and height of a picture, upright, and its orientation, by its head; None: it is for its reader to complain."""
    try:
        with open_file(path) as stream, Image.open(stream, formats=READERS) as file:
            orientation = file.getexif().get(ORIENTATION, 1)
            size = file.size
    except Exception:  # readers of damaged files fail in every way
        return None, 1
    return (size[::-1] if orientation in LYING else size), orientation

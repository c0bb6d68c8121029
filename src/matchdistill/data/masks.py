"""Masks as COCO stores them, polygons or run lengths: checked, and drawn as bitmaps.

Axes: H height, W width.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1.0  # pixels by which boxes and polygons may leave their image; COCO has some that do, by rounding

RASTERISERS = ("faster_coco_eval.core.mask", "pycocotools.mask")  # of the same functions; the first that is there


def rasteriser() -> Any:
    """The module that turns polygons into bitmaps.

    Raises:
        ValueError: in one line, what to install.
    """
    for name in RASTERISERS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ValueError("masks need faster-coco-eval or pycocotools: pip install 'matchdistill[detection]'")


def is_numbers(values: Any) -> bool:
    """Whether it is a list of numbers that are finite and not absurd.

    In plain Python: for a million lists of a few numbers each, NumPy takes longer.
    """
    return (
        isinstance(values, list)
        and {*map(type, values)} <= {int, float}
        and min(values, default=0) > -1e9
        and max(values, default=0) < 1e9
        and not math.isnan(sum(values))  # which any comparison lets pass, at some place
    )


def check_mask(segmentation: Any, height: int, width: int) -> None:
    """Make sure that a mask can be drawn: the rasterisers read and write beside their memory if it cannot.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(segmentation, dict):
        run_lengths(segmentation, height, width)
        return
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no mask")
    for polygon in segmentation:
        if not is_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of its mask is not x, y of three corners or more")
        for coordinates, end in ((polygon[::2], width), (polygon[1::2], height)):
            if min(coordinates) < -TOLERANCE or max(coordinates) > end + TOLERANCE:
                raise ValueError(f"its mask leaves its image of {width} x {height} pixels")


def draw_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The bitmap (H, W), 1 inside, of a mask that `check_mask` let pass."""
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation, height, width)
        return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T.astype(np.uint8)
    library = rasteriser()
    bitmap: NDArray[np.uint8] = library.decode(library.merge(library.frPyObjects(segmentation, height, width)))
    return bitmap


def run_lengths(mask: dict[str, Any], height: int, width: int) -> NDArray[np.int64]:
    """How many pixels are outside, inside, outside ... in turn, down the columns of a mask from left to right.

    Raises:
        ValueError: they do not make a mask of (height, width).

    Examples:
        >>> run_lengths({"size": [2, 3], "counts": [1, 3, 2]}, 2, 3)
        array([1, 3, 2])
        >>> run_lengths({"size": [2, 3], "counts": "132"}, 2, 3)
        array([1, 3, 2])
    """
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        raise ValueError(f"its mask is for an image of height and width {size}, its image has {[height, width]}")
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and {*map(type, counts)} == {int}:
        runs = np.array(counts)
    else:
        raise ValueError("its mask has no run lengths")
    pixels = height * width
    bounded = runs.dtype == np.int64 and runs.min() >= 0 and runs.max() <= pixels and len(runs) <= 2 * pixels + 2
    if not bounded or runs.sum() != pixels:  # a sum of numbers without bounds could come round to it
        raise ValueError(f"the run lengths of its mask do not cover its image of {width} x {height} pixels")
    return runs


def _decompressed(text: str) -> NDArray[np.int64]:
    """Run lengths from COCO's text.

    A character holds five bits of a number, the lowest first, and a sixth that says whether more follow; the highest
    of the last five is the sign. From the fourth on, a number is the difference to the last but one.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] > 31:
        raise ValueError("the run lengths of its mask are damaged")
    ends = np.flatnonzero(codes < 32)
    sizes = np.diff(ends, prepend=-1)
    if sizes.max() > 7:  # 35 bits
        raise ValueError("the run lengths of its mask are damaged")
    starts = ends - sizes + 1
    shifts = 5 * (np.arange(len(codes)) - starts.repeat(sizes))
    numbers: NDArray[np.int64] = np.add.reduceat((codes & 31) << shifts, starts) - (
        (codes[ends] & 16) << (5 * sizes - 4)
    )
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def runs_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's run lengths, not compressed.

    Examples:
        >>> runs_of(np.array([[False, True, False], [True, True, False]]))
        {'size': [2, 3], 'counts': [1, 3, 2]}
    """
    column_wise = mask.T.flatten()
    changes = np.flatnonzero(np.diff(column_wise, prepend=False))  # the first run is outside, of no length if need be
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}

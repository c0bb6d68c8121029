import importlib

import numpy as np
import pytest

from matchdistill.data import masks as module
from matchdistill.data.masks import check_mask, draw_mask, run_lengths

pycocotools = pytest.importorskip("pycocotools.mask")


def bitmaps():
    """Masks of many kinds: empty, full, a pixel in a corner, stripes, noise, and blobs whose runs have many digits."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:480, :640]
    corner = np.zeros((7, 5), np.uint8)
    corner[0, 0] = corner[-1, -1] = 1
    yield from (np.zeros((4, 6), np.uint8), np.ones((4, 6), np.uint8), corner, np.arange(35).reshape(7, 5) % 2)
    yield from ((random.random((9, 13)) < share).astype(np.uint8) for share in (0.1, 0.5, 0.9))
    yield ((rows - 240) ** 2 + (columns - 320) ** 2 < 200**2).astype(np.uint8)
    yield ((rows // 30 + columns // 50) % 3 == 0).astype(np.uint8)


def runs_of(bitmap):
    """By walking down the columns."""
    runs, value = [0], 0
    for pixel in bitmap.T.flatten().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("bitmap", bitmaps())
def test_run_lengths_are_read_as_numbers_and_as_text(bitmap):
    size = list(bitmap.shape)
    runs = runs_of(bitmap)
    text = pycocotools.encode(np.asfortranarray(bitmap.astype(np.uint8)))["counts"].decode()
    for counts in (runs, text):
        mask = {"size": size, "counts": counts}
        check_mask(mask, *size)
        assert run_lengths(mask, *size).tolist() == runs
        drawn = draw_mask(mask, *size)
        assert drawn.dtype == np.uint8
        assert np.array_equal(drawn, bitmap)


POLYGONS = [
    [[2, 3, 17.5, 3, 17.5, 12.25]],
    [[2, 3, 9.5, 3, 9.5, 8.25], [12, 3, 16, 3.5, 16, 9, 12, 9]],
    [[2, 3, 12, 3, 12, 9, 2, 9], [8, 1, 15, 1, 15, 15, 8, 15]],  # overlapping
    [[-1, -0.5, 31, -1, 30.75, 21, -1, 20.5]],  # all of the image, and as much beside it as is allowed
    [[5, 5, 5, 5, 6, 5, 6, 5]],  # nothing
]


@pytest.mark.parametrize("library", module.RASTERISERS)
@pytest.mark.parametrize("polygons", POLYGONS)
def test_polygons_are_drawn_as_by_pycocotools(polygons, library, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setattr(module, "RASTERISERS", (library,))
    check_mask(polygons, 20, 30)
    expected = np.max([pycocotools.decode(pycocotools.frPyObjects([part], 20, 30)) for part in polygons], 0)[:, :, 0]
    drawn = draw_mask(polygons, 20, 30)
    assert (drawn.shape, drawn.dtype) == ((20, 30), np.uint8)
    assert np.array_equal(drawn, expected)


def test_second_rasteriser_is_taken_without_the_first(monkeypatch):
    monkeypatch.setattr(module, "RASTERISERS", ("not_installed.mask", "pycocotools.mask"))
    assert module.rasteriser() is importlib.import_module("pycocotools.mask")


def test_without_a_rasteriser(monkeypatch):
    monkeypatch.setattr(module, "RASTERISERS", ("not_installed.mask",))
    with pytest.raises(ValueError, match=r"pip install 'matchdistill\[detection\]'"):
        draw_mask(POLYGONS[0], 20, 30)
    assert draw_mask({"size": [2, 3], "counts": [1, 3, 2]}, 2, 3).tolist() == [[0, 1, 0], [1, 1, 0]]


TRIANGLE = [2, 3, 9.5, 3, 9.5, 8.25]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "no mask"),
        ([], "no mask"),
        ("polygon", "no mask"),
        ([TRIANGLE, TRIANGLE[:4]], "three corners"),
        ([[*TRIANGLE[:5], 1, 2]], "three corners"),
        ([[*TRIANGLE[:5], None]], "three corners"),
        ([[*TRIANGLE[:5], "8"]], "three corners"),
        ([[*TRIANGLE[:5], True]], "three corners"),
        ([[*TRIANGLE[:5], float("nan")]], "three corners"),
        ([[*TRIANGLE[:5], float("-inf")]], "three corners"),
        ([[*TRIANGLE[:5], 10**400]], "three corners"),
        (TRIANGLE, "three corners"),
        ([[*TRIANGLE[:4], 31.5, 5]], "leaves its image of 30 x 20"),
        ([[*TRIANGLE[:4], 5, 21.5]], "leaves its image of 30 x 20"),
        ([[*TRIANGLE[:4], -1.5, 5]], "leaves its image"),
        ([[*TRIANGLE[:4], 5, -1.5]], "leaves its image"),
        ({"size": [30, 20], "counts": [600]}, r"height and width \[30, 20\], its image has \[20, 30\]"),
        ({"counts": [600]}, "height and width None"),
        ({"size": [20, 30]}, "no run lengths"),
        ({"size": [20, 30], "counts": []}, "no run lengths"),
        ({"size": [20, 30], "counts": [600.0]}, "no run lengths"),
        ({"size": [20, 30], "counts": [600, None]}, "no run lengths"),
        ({"size": [20, 30], "counts": [599]}, "do not cover its image of 30 x 20"),
        ({"size": [20, 30], "counts": [300, 301]}, "do not cover"),
        ({"size": [20, 30], "counts": [300, -10, 310]}, "do not cover"),
        ({"size": [20, 30], "counts": [600, 10**30]}, "do not cover"),
        ({"size": [20, 30], "counts": [2**62, 2**62, 2**62, 2**62 + 600]}, "do not cover"),
        ({"size": [20, 30], "counts": "gb0"}, "do not cover"),
        ({"size": [20, 30], "counts": ""}, "damaged"),
        ({"size": [20, 30], "counts": "hello world"}, "damaged"),
        ({"size": [20, 30], "counts": "hbp0"}, "damaged"),
        ({"size": [20, 30], "counts": "hb0 "}, "damaged"),
        ({"size": [20, 30], "counts": "hb0h"}, "damaged"),
        ({"size": [20, 30], "counts": "hhhhhhhhhhhhh0"}, "damaged"),
    ],
)
def test_masks_that_cannot_be_drawn(mask, reason):
    with pytest.raises(ValueError, match=reason) as info:
        check_mask(mask, 20, 30)
    assert "\n" not in str(info.value)

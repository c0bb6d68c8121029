"""Scenes of Fashion-MNIST items with boxes and masks: a detection set of real images, of any size.

``python -m matchdistill.data.scenes OUT --train 1000 --val 300 --size 160`` writes one in the format of COCO, and with
``--format yolo`` one in the format of Ultralytics.

Axes: H height, W width. Images and masks are NumPy arrays.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import yaml
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from matchdistill.data.masks import runs_of
from matchdistill.data.tensors import FASHION_CLASSES, GrayImages, find_fashion_mnist, load_fashion_mnist

SMALLEST = 16  # pixels: the least side of an item and of its 28 x 28 source
THRESHOLD = 40  # of 255: darker pixels of an item are not part of it
VISIBLE = 0.3  # the least share of an item that later ones, and the edge of the image, leave to be seen

Format = Literal["coco", "yolo"]

README = """# Scenes of Fashion-MNIST items

{train} training and {val} validation images of {size} x {size} pixels in the layout and format of {written}, with boxes
and masks of ten classes.

Made by `python -m matchdistill.data.scenes OUT --train {train} --val {val} --size {size} --seed {seed}{option}`: items are
scaled, mirrored, tinted and laid on a coloured noise background, later ones over earlier ones. Boxes, masks and areas
are of what is left to be seen. {masks} Training scenes have items from Fashion-MNIST's training images alone,
validation scenes from its test images.

Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist) is Copyright (c) 2017 Zalando SE, under the MIT license.
"""

WORDS = {
    "coco": {
        "written": "COCO 2017",
        "option": "",
        "masks": "Masks without holes are polygons, the others run lengths. Of ten images one is empty,\n"
        "and of ten validation images one has a crowd.",
    },
    "yolo": {
        "written": "Ultralytics",
        "option": " --format yolo",
        "masks": "Each mask is one polygon, its parts and holes joined by lines there\nand back. One image in ten is empty.",
    },
}


class Item(NamedTuple):
    """Something that a scene shows.

    Attributes:
        label: its class, from 0 on.
        size: pixels of it, whether they are seen or not.
        crowd: whether it is many items, annotated as one.
    """

    label: int
    size: int
    crowd: bool


def write_scenes(
    out: Path,
    train: int,
    val: int,
    size: int = 160,
    seed: int = 0,
    fashion_mnist: Path | None = None,
    format: Format = "coco",
) -> None:
    """Write a set of scenes.

    Args:
        out: the folder to make; it appears when all is written.
        train: number of training images.
        val: number of validation images.
        size: height and width of the images in pixels.
        seed: of everything random.
        fashion_mnist: the folder with its four files, where the Debian package is not installed.
        format: "coco", which :class:`DetectionData` reads as it is; or "yolo", which Ultralytics reads by its ``data.yaml``
            for detection and for segmentation, and which has no crowds.

    Raises:
        ValueError: in one line, an unknown format, a number out of range, a folder that exists, or that Fashion-MNIST is not
            there.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 4 * SMALLEST)):
        if value < least:
            raise ValueError(f"{name} is {value}: expected a whole number from {least} on")
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}: expected one of {', '.join(get_args(Format))}")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or give another folder")
    try:
        source = find_fashion_mnist(fashion_mnist, download=False)
    except ValueError as error:
        raise ValueError(
            "no Fashion-MNIST: install the Debian package dataset-fashion-mnist, or give the folder with its four "
            "files as --fashion-mnist"
        ) from error
    splits = load_fashion_mnist(source)
    partial = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        write = _write_coco if format == "coco" else _write_yolo
        write(partial, [(count, items) for count, items in zip((train, val), splits, strict=True)], size, seed)
        readme = README.format(train=train, val=val, size=size, seed=seed, **WORDS[format])
        (partial / "README.md").write_text(readme, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_coco(out: Path, splits: Sequence[tuple[int, GrayImages]], size: int, seed: int) -> None:
    (out / "annotations").mkdir(parents=True)
    for name, (count, items) in zip(("train2017", "val2017"), splits, strict=True):
        (out / name).mkdir()
        content = _write_split(out / name, count, items, size, seed)
        (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_yolo(out: Path, splits: Sequence[tuple[int, GrayImages]], size: int, seed: int) -> None:
    """One file of text for each image, a line for each item: its class, and its outline as shares of the image."""
    names = ("train", "val")
    for name, (count, items) in zip(names, splits, strict=True):
        images, labels = (out / kind / name for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(1, count + 1):
            chance = np.random.default_rng([seed, name == "val", number])
            pixels, shown = compose(items, size, chance, empty=number % 10 == 4)
            Image.fromarray(pixels).save(images / f"{number:012}.jpg", quality=95)
            lines = [
                " ".join([str(item.label), *(f"{value / size:.6g}" for value in joined(outlines(mask)))])
                for item, mask in shown
            ]
            (labels / f"{number:012}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    content = {**{name: f"images/{name}" for name in names}, "names": dict(enumerate(FASHION_CLASSES))}
    (out / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _write_split(folder: Path, count: int, items: GrayImages, size: int, seed: int) -> dict[str, Any]:
    """Write the images; returns the content of their annotation file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    validation = folder.name.startswith("val")
    for number in range(1, count + 1):
        chance = np.random.default_rng([seed, validation, number])
        pixels, shown = compose(items, size, chance, empty=number % 10 == 4, crowd=validation and number % 10 == 7)
        name = f"{number:012}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95)
        images.append({"id": number, "file_name": name, "height": size, "width": size})
        for item, mask in shown:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": item.label + 1}
            annotations.append(entry | _region(mask) | {"iscrowd": int(item.crowd)})
    categories = [{"id": label, "name": name} for label, name in enumerate(FASHION_CLASSES, 1)]
    info = {"description": "Scenes of Fashion-MNIST items"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def compose(
    items: GrayImages, size: int, chance: Generator, empty: bool = False, crowd: bool = False
) -> tuple[NDArray[np.uint8], list[tuple[Item, NDArray[np.bool_]]]]:
    """A scene (H, W, 3) and what it shows, with masks (H, W) of what is to be seen of it.

    Args:
        items: to choose from.
        size: height and width in pixels.
        chance: what all choices are drawn from.
        empty: only background.
        crowd: also small items of one class on a heap.
    """
    scene = _background(size, chance)
    owner = np.full((size, size), -1)  # number of the item that is seen at a pixel
    shown: list[Item] = []
    if crowd:
        label = int(chance.integers(len(FASHION_CLASSES)))
        corners = chance.integers(size - 3 * SMALLEST, size=2) + chance.integers(2 * SMALLEST, size=(10, 2))
        for corner in corners:
            colours, mask = _sprite(items, label, SMALLEST, chance)
            owner[_laid(mask, corner, size)] = 0
            scene.paste(colours, tuple(corner), mask)
        shown.append(Item(label, int((owner == 0).sum()), crowd=True))
    for _ in range(0 if empty else chance.integers(1, 9)):
        for _ in range(10):  # places to try, before it is left out
            # At the bottom, where it hides no others, there may be one as large as the image has room for.
            large = not shown and chance.random() < 0.3
            side = int(chance.integers(size * 3 // 4, size) if large else chance.integers(SMALLEST, size // 2))
            label = int(chance.integers(len(FASHION_CLASSES)))
            colours, mask = _sprite(items, label, side, chance)
            corner = chance.integers(-side // 4, size - side + side // 4, size=2)
            new = Item(label, int((np.asarray(mask) > 0).sum()), crowd=False)
            covered = np.where(_laid(mask, corner, size), len(shown), owner)
            seen = np.bincount(covered[covered >= 0], minlength=len(shown) + 1)
            if all(seen >= [max(VISIBLE * item.size, SMALLEST) for item in (*shown, new)]):
                scene.paste(colours, tuple(corner), mask)
                owner = covered
                shown.append(new)
                break
    return np.array(scene), [(item, owner == number) for number, item in enumerate(shown)]


def _background(size: int, chance: Generator) -> Image.Image:
    """Coloured clouds under fine noise."""
    clouds = Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    noise = chance.normal(0, 12, (size, size, 3))
    return Image.fromarray((np.asarray(clouds) * 0.6 + noise + 30).clip(0, 255).astype(np.uint8))


def _sprite(items: GrayImages, label: int, side: int, chance: Generator) -> tuple[Image.Image, Image.Image]:
    """An item of a class, tinted, and its mask; both (side, side)."""
    index = chance.choice(np.flatnonzero(items.labels.numpy() == label))
    gray = Image.fromarray(items.images[index].numpy()).resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(gray)[:, :: chance.choice([-1, 1])]
    colours = (values[:, :, None] * chance.uniform(0.3, 1, 3)).astype(np.uint8)
    return Image.fromarray(colours), Image.fromarray(np.where(values > THRESHOLD, 255, 0).astype(np.uint8))


def _laid(mask: Image.Image, corner: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Where in a scene (H, W) an item's mask comes to lie."""
    layer = Image.new("L", (size, size))
    layer.paste(mask, tuple(corner))
    return np.asarray(layer) > 0


def _region(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Box, area and segmentation of a mask (H, W)."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    whole = np.array_equal(ndimage.binary_fill_holes(mask), mask)
    return {"bbox": box, "area": len(rows), "segmentation": outlines(mask) if whole else runs_of(mask)}


# Around a pixel: the neighbour beyond an edge, and where the edge starts and ends, clockwise; all (down, right).
EDGES = (
    ((-1, 0), (0, 0), (0, 1)),
    ((0, 1), (0, 1), (1, 1)),
    ((1, 0), (1, 1), (1, 0)),
    ((0, -1), (1, 0), (0, 0)),
)


def outlines(mask: NDArray[np.bool_]) -> list[list[int]]:
    """Polygons [x, y, x, y ...] along the edges of the pixels of a mask (H, W) without holes.

    Examples:
        >>> outlines(np.array([[True, True, False], [False, True, False]]))
        [[0, 0, 2, 0, 2, 2, 1, 2, 1, 1, 0, 1]]
    """
    following = defaultdict(list)  # where the edges from a point lead
    padded = np.pad(mask, 1)
    for (down, right), start, end in EDGES:
        beyond = np.roll(padded, (-down, -right), (0, 1))[1:-1, 1:-1]
        for row, column in np.argwhere(mask & ~beyond).tolist():
            following[row + start[0], column + start[1]].append((row + end[0], column + end[1]))
    polygons = []
    while following:
        point = next(iter(following))
        loop = []
        while point in following:
            loop.append(point)
            ends = following[point]
            step = ends.pop()
            if not ends:
                del following[point]
            point = step
        around = np.array(loop)
        steps = np.diff(around, axis=0, append=around[:1])
        corners = around[(steps != np.roll(steps, 1, axis=0)).any(1)]
        polygons.append(corners[:, ::-1].flatten().tolist())
    return polygons


def joined(polygons: list[list[int]]) -> list[int]:
    """Polygons [x, y, x, y ...] as one that encloses the same by the even-odd rule: lines lead to each of them and back.

    Examples:
        >>> joined([[0, 0, 1, 0, 1, 1], [5, 5, 6, 5, 6, 6]])
        [0, 0, 1, 0, 1, 1, 0, 0, 5, 5, 6, 5, 6, 6, 5, 5]
    """
    if len(polygons) == 1:
        return polygons[0]
    first = polygons[0][:2]
    others = [value for polygon in polygons[1:] for value in (*polygon, *polygon[:2], *first)]
    return [*polygons[0], *first, *others][: -len(first)]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m matchdistill.data.scenes", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--train", type=int, default=1000, help="number of training images (%(default)s)")
    parser.add_argument("--val", type=int, default=300, help="number of validation images (%(default)s)")
    parser.add_argument("--size", type=int, default=160, help="height and width in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--fashion-mnist", type=Path, help="the folder with its files, without the Debian package")
    parser.add_argument("--format", choices=get_args(Format), default="coco", help="of the annotations (%(default)s)")
    options = vars(parser.parse_args(arguments))
    try:
        write_scenes(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Where data sets with a class for every pixel keep their images and masks.

Axes: N images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from matchdistill.data.annotations import read_coco
from matchdistill.data.folder import some, val_folder, walk
from matchdistill.data.pictures import IMAGE_SUFFIXES
from matchdistill.data.pixels import MOST_CLASSES, DrawnMasks, PanopticMasks, PixelMasks, PngMasks, Values, lookup
from matchdistill.files import read_json, read_text

CLASSES_FILE = "classes.txt"
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
# The classes that are trained and measured, by the ids in the files.
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_OTHERS = [number for number in range(34) if number not in CITYSCAPES]


@dataclass(frozen=True)
class PixelImages:
    """N image files and their masks."""

    paths: list[str]
    masks: PixelMasks

    def subset(self, index: Tensor) -> PixelImages:
        """The images of ``index`` (M,)."""
        return PixelImages([self.paths[i] for i in index.tolist()], self.masks.subset(index))


class Wanted(NamedTuple):
    """What is read of a data set.

    Attributes:
        root: its folder.
        splits: names of the parts for training and validation; None: the usual ones.
        classes: names of the classes; None: as the set has them.
        ignore: values of masks that count nowhere.
    """

    root: Path
    splits: tuple[str | None, str | None] = (None, None)
    classes: Sequence[str] | None = None
    ignore: Sequence[int] = ()

    def named(self, *usual: str) -> list[str]:
        """The names of both parts."""
        return [given or name for given, name in zip(self.splits, usual, strict=True)]


Sets = tuple[PixelImages, PixelImages, list[str]]  # for training, for validation, names of the classes


def _class_names(wanted: Wanted) -> list[str]:
    """Names that were given, or the lines of the file with the classes."""
    names, source = wanted.classes, "data.classes"
    if names is None:
        path = wanted.root / CLASSES_FILE
        source = str(path)
        if not path.is_file():
            raise ValueError(
                f"{wanted.root} has no {CLASSES_FILE}: write the names of the classes into it, a line for each value of the "
                "masks from 0 on, or give them as data.classes"
            )
        names = [line.strip() for line in read_text(path).rstrip().splitlines()]
        if "" in names:
            raise ValueError(f"{path} has no name in line {names.index('') + 1}: give each value of the masks a name")
    if not 1 < len(names) <= MOST_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"{source} has {len(names)} names: expected 2 to {MOST_CLASSES}, each once")
    return list(names)


def _check_own_classes(wanted: Wanted, name: str) -> None:
    if wanted.classes is not None:
        raise ValueError(f"data.classes is given, but {name} has its own: leave it out")


def _numbered(names: Sequence[str], ignore: Sequence[int]) -> Values:
    return lookup({label: label for label in range(len(names))}, ignore)


def _pairs(images: Path, masks: Path) -> tuple[list[str], list[str]]:
    """The images of a folder and the masks of a folder beside it, which have the same names but for the suffix.

    Raises:
        ValueError: in one line, what is missing.
    """
    found = _by_stem(images, IMAGE_SUFFIXES)
    there = _by_stem(masks, {".png"})
    if not found:
        raise ValueError(f"{images} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    _check_masks_there(sorted(found.keys() - there.keys()), len(found), images, f"{masks}/NAME.png")
    if lone := there.keys() - found.keys():
        warnings.warn(f"{masks} has {len(lone)} masks without an image, which are left out: {some(lone)}", stacklevel=2)
    names = sorted(found)
    return [found[name] for name in names], [there[name] for name in names]


def _check_masks_there(missing: Sequence[str], count: int, images: Path, expected: str) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} of {count} images of {images} have no mask: {some(missing)}; expected {expected}"
        )


def _by_stem(folder: Path, suffixes: set[str]) -> dict[str, str]:
    """The files of some types by their paths in a folder, without the suffix."""
    left_out: list[str] = []
    found: dict[str, str] = {}
    for path in walk(folder, left_out):
        stem, suffix = os.path.splitext(os.path.relpath(path, folder))  # noqa: PTH122 - Path is slow for a million files
        if suffix.lower() in suffixes:
            if stem in found:
                raise ValueError(f"{path} and {found[stem]} have the same name: one mask cannot be of both")
            found[stem] = path
    return found


def read_folders(wanted: Wanted) -> Sets:
    """``ROOT/train/images`` and ``ROOT/train/masks``, or ``images/train`` and ``masks/train``; ``val`` likewise."""
    root = wanted.root
    inside = (root / "images").is_dir()
    usual = val_folder(root / "images" if inside else root).name
    names = _class_names(wanted)
    sets = []
    for split in wanted.named("train", usual):
        images, masks = ((root / kind / split if inside else root / split / kind) for kind in ("images", "masks"))
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(
                    f"{root} has no folder {folder.relative_to(root)}: expected {root}/train/images, {root}/train/masks and "
                    f"val likewise, or images/train and masks/train"
                )
        paths, files = _pairs(images, masks)
        sets.append(PixelImages(paths, PngMasks(files, _numbered(names, wanted.ignore))))
    return sets[0], sets[1], names


def read_voc(wanted: Wanted) -> Sets:
    """Pascal VOC: ``JPEGImages``, ``SegmentationClass``, and the names in ``ImageSets/Segmentation/*.txt``."""
    root = wanted.root
    names = list(wanted.classes or VOC_CLASSES)
    sets = []
    for split in wanted.named("train", "val"):
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not listing.is_file():
            near = next((path for path in sorted(root.glob("**/VOC20*")) if (path / "ImageSets").is_dir()), None)
            hint = f"; did you mean {str(near)!r} as data.root?" if near else ""
            raise ValueError(f"{listing} does not exist{hint}")
        stems = read_text(listing).split()
        if not stems:
            raise ValueError(f"{listing} names no images")
        images = [str(root / "JPEGImages" / f"{stem}.jpg") for stem in stems]
        masks = [str(root / "SegmentationClass" / f"{stem}.png") for stem in stems]
        _check_there(images, listing)
        missing = [stem for stem, mask in zip(stems, masks, strict=True) if not os.path.isfile(mask)]  # noqa: PTH113
        _check_masks_there(missing, len(stems), listing, f"{root}/SegmentationClass/NAME.png")
        sets.append(PixelImages(images, PngMasks(masks, _numbered(names, wanted.ignore))))
    return sets[0], sets[1], names


def _check_there(images: Sequence[str], source: Path) -> None:
    if missing := [path for path in images if not os.path.isfile(path)]:  # noqa: PTH113 - Path is slow for a million files
        raise ValueError(f"{source} names {len(missing)} images that are not there: {some(missing)}")


def read_cityscapes(wanted: Wanted) -> Sets:
    """``leftImg8bit/train/CITY/*_leftImg8bit.png`` and ``gtFine/train/CITY/*_gtFine_labelIds.png``; ``val`` likewise."""
    root = wanted.root
    names = list(CITYSCAPES.values())
    _check_own_classes(wanted, "cityscapes")
    labels = lookup({number: label for label, number in enumerate(CITYSCAPES)}, [*CITYSCAPES_OTHERS, *wanted.ignore])
    sets = []
    for split in wanted.named("train", "val"):
        folder = root / "leftImg8bit" / split
        images = sorted(str(path) for path in folder.glob("*/*_leftImg8bit.png"))
        if not images:
            raise ValueError(f"{folder} has no images CITY/NAME_leftImg8bit.png: unpack leftImg8bit and gtFine there")
        masks = [_cityscapes_mask(root, split, path) for path in images]
        missing = [path for path, mask in zip(images, masks, strict=True) if not os.path.isfile(mask)]  # noqa: PTH113
        expected = f"{root}/gtFine/{split}/CITY/NAME_gtFine_labelIds.png"
        _check_masks_there([Path(path).name for path in missing], len(images), folder, expected)
        sets.append(PixelImages(images, PngMasks(masks, labels)))
    return sets[0], sets[1], names


def _cityscapes_mask(root: Path, split: str, image: str) -> str:
    path = Path(image)
    name = path.name.removesuffix("leftImg8bit.png") + "gtFine_labelIds.png"
    return str(root / "gtFine" / split / path.parent.name / name)


def read_coco_objects(wanted: Wanted) -> Sets:
    """COCO's objects, ``annotations/instances_train2017.json``: their masks are drawn, what is behind them is class 0."""
    _check_own_classes(wanted, "coco")
    root = wanted.root
    sets, categories = [], []
    for split in wanted.named("train2017", "val2017"):
        notes, folder = root / "annotations" / f"instances_{split}.json", root / split
        _check_exist(notes, folder)
        images, known = read_coco(notes, folder, False, True, "refuse", folder)
        categories.append(known)
        labels = _numbered(["background", *known.values()], wanted.ignore)
        sets.append(PixelImages(images.paths, DrawnMasks(images.paths, labels, images)))
    return sets[0], sets[1], ["background", *_same(root, categories)]


def read_coco_panoptic(wanted: Wanted) -> Sets:
    """COCO's panoptic PNGs, ``annotations/panoptic_train2017.json`` and ``annotations/panoptic_train2017/*.png``."""
    _check_own_classes(wanted, "coco-panoptic")
    root = wanted.root
    sets, categories = [], []
    for split in wanted.named("train2017", "val2017"):
        notes, folder = root / "annotations" / f"panoptic_{split}.json", root / split
        masks = notes.with_suffix("")
        _check_exist(notes, masks, folder)
        images, known = _panoptic(notes, folder, masks, wanted.ignore)
        sets.append(images)
        categories.append(known)
    return sets[0], sets[1], _same(root, categories)


# Kinds of entries in COCO's panoptic annotations.
IMAGE, CATEGORY = {"id": int, "file_name": str}, {"id": int, "name": str}
SEGMENT = {"id": int, "category_id": int}
ANNOTATION = {"image_id": int, "file_name": str, "segments_info": list[SEGMENT]}  # type: ignore[valid-type]


def _panoptic(notes: Path, folder: Path, masks: Path, ignore: Sequence[int]) -> tuple[PixelImages, dict[int, str]]:
    content = read_json(
        notes,
        images=list[IMAGE],  # type: ignore[valid-type]
        annotations=list[ANNOTATION],  # type: ignore[valid-type]
        categories=list[CATEGORY],  # type: ignore[valid-type]
    )
    known = {each["id"]: each["name"] for each in sorted(content["categories"], key=lambda each: each["id"])}
    if not 1 < len(known) <= MOST_CLASSES:
        raise ValueError(f"{notes} has {len(known)} categories: expected 2 to {MOST_CLASSES}")
    values = {category: label for label, category in enumerate(known)}
    files = {each["id"]: each["file_name"] for each in content["images"]}
    paths, pngs, segments, kinds, ends = [], [], [], [], []
    for each in content["annotations"]:
        strange = [segment["category_id"] for segment in each["segments_info"] if segment["category_id"] not in values]
        if strange or each["image_id"] not in files:
            what = f"the category {strange[0]}" if strange else f"the image {each['image_id']}"
            raise ValueError(f"{notes}: the annotation {each['file_name']!r} is of {what}, which is not there")
        for name in (files[each["image_id"]], each["file_name"]):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{notes}: the name {name!r} leads out of its folder")
        paths.append(str(folder / files[each["image_id"]]))
        pngs.append(str(masks / each["file_name"]))
        segments += [segment["id"] for segment in each["segments_info"]]
        kinds += [values[segment["category_id"]] for segment in each["segments_info"]]
        ends.append(len(segments))
    if not paths:
        raise ValueError(f"{notes} has no annotations")
    _check_there(paths, notes)
    missing = [Path(png).name for png in pngs if not os.path.isfile(png)]  # noqa: PTH113
    _check_masks_there(missing, len(pngs), folder, f"{masks}/NAME.png")
    bounds = np.array([0, *ends])
    labels = lookup({label: label for label in values.values()}, ignore)
    numbers, classes = np.array(segments, np.int64), np.array(kinds, np.uint8)
    return PixelImages(paths, PanopticMasks(pngs, labels, numbers, classes, bounds[:-1], bounds[1:])), known


def read_coco_stuff(wanted: Wanted) -> Sets:
    """COCO-Stuff: ``ROOT/train2017``, and gray PNGs in ``ROOT/stuffthingmaps/train2017``."""
    root, names = wanted.root, _class_names(wanted)
    sets = []
    for split in wanted.named("train2017", "val2017"):
        folder, masks = root / split, root / "stuffthingmaps" / split
        _check_exist(folder, masks)
        paths, files = _pairs(folder, masks)
        sets.append(PixelImages(paths, PngMasks(files, _numbered(names, wanted.ignore))))
    return sets[0], sets[1], names


def _check_exist(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")


def _same(root: Path, categories: Sequence[Mapping[int, str]]) -> list[str]:
    if lone := sorted(set(categories[0].items()) ^ set(categories[1].items())):
        raise ValueError(
            f"{root}: training and validation images must have the same categories, but {lone[0][1]!r} with id {lone[0][0]} "
            "is only in one of them"
        )
    return list(categories[0].values())


PIXEL_SETS: dict[str, Callable[[Wanted], Sets]] = {
    "folder": read_folders,
    "voc": read_voc,
    "cityscapes": read_cityscapes,
    "coco": read_coco_objects,
    "coco-panoptic": read_coco_panoptic,
    "coco-stuff": read_coco_stuff,
}

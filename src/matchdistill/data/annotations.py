"""Annotations in the format of COCO: all is read and checked at once, before anything trains on it.

Axes: N images, A annotations, H height, W width. Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import os
import pickle
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from matchdistill.data.coco import Annotations, CocoImages
from matchdistill.data.masks import TOLERANCE, check_mask, is_numbers
from matchdistill.files import read_json
from matchdistill.messages import cause

T = TypeVar("T")

# Pixels. Of less, the sides of a box can fall together when it is mirrored and resized in float32, which torchvision's
# detectors refuse in the middle of a run.
SMALLEST_SIDE = 0.01


def read_coco(
    path: Path,
    folder: Path,
    training: bool,
    masks: bool,
    bad: Literal["refuse", "skip"],
    within: Path | None = None,
) -> tuple[CocoImages, dict[int, str]]:
    """The images of an annotation file, and the names of the categories by id, in the order of the ids.

    Args:
        path: the file.
        folder: where the images are.
        training: leave out crowds, which have no box of their own, and cut boxes off at the edges of the image.
            Otherwise both stay, as the metric counts them.
        masks: read and check the masks too.
        bad: what to do about images and annotations that cannot be used: "refuse" them all, or "skip" them with a
            warning. Annotations of a skipped image are skipped with it.
        within: a folder that no image's name may lead out of; None: they may lead anywhere.

    Raises:
        ValueError: in one line, why the file cannot be used, or the ids of what is bad in it and how.
    """
    try:
        content = read_json(path, images=list, annotations=list, categories=list)
    except OSError as error:
        raise ValueError(f"annotations {path} cannot be read ({cause(error)})") from error
    categories = _categories(path, content["categories"])
    labels = {category_id: label for label, category_id in enumerate(categories, 1)}
    problems: list[str] = []
    files = _image_files(folder, _by_id("image", content["images"], problems), problems, within)
    found = _regions(content["annotations"], files, labels, training, masks, problems)
    _report(path, problems, bad)
    if twice := [annotation_id for annotation_id, count in found.ids.items() if count > 1]:
        warnings.warn(
            f"{path}: {len(twice)} ids of annotations are there more than once, such as {twice[0]}: all of them are used",
            stacklevel=2,
        )
    used = {image_id: file for image_id, file in files.items() if file}
    if not used:
        raise ValueError(f"{path} has no images that can be used")
    return _images(used, found, masks), categories


class _ImageFile(NamedTuple):
    number: int  # among the images that can be used
    path: str
    height: int
    width: int


class _Regions(NamedTuple):
    """Annotations that can be used, in the order of the file.

    Attributes:
        rows: of each the number of its image, its box, label and area, and whether it is a crowd: 8 numbers.
        masks: of each the mask, pickled; empty if they are not read.
        ids: how often each id is there.
    """

    rows: list[tuple[float, ...]]
    masks: list[bytes]
    ids: Counter[int]


def _regions(
    entries: list[Any],
    files: dict[int, _ImageFile | None],
    labels: dict[int, int],
    training: bool,
    masks: bool,
    problems: list[str],
) -> _Regions:
    """The annotations of a file that can be used; what is wrong with the others is added to ``problems``."""
    # Nothing refers to the id of an annotation: some tools give the same one again and again.
    found = _Regions([], [], Counter())
    for place, entry in enumerate(entries, 1):
        annotation_id = _id(entry)
        if annotation_id is None:
            problems.append(f"the annotation at place {place} has no whole number as id")
            continue
        found.ids[annotation_id] += 1
        try:
            file = _looked_up(files, entry, "image_id")
            label = _looked_up(labels, entry, "category_id")
            if file is None or (training and entry.get("iscrowd") == 1):
                continue
            box, area, crowd = _region(entry, file, training)
            if masks:
                check_mask(entry.get("segmentation"), file.height, file.width)
                found.masks.append(pickle.dumps(entry["segmentation"]))
            found.rows.append((file.number, *box, label, area, crowd))
        except ValueError as error:
            problems.append(f"annotation {annotation_id}: {error}")
    return found


def _images(files: dict[int, _ImageFile], found: _Regions, masks: bool) -> CocoImages:
    """Images by id, with their annotations, which are put in the order of the images."""
    order = sorted(range(len(found.rows)), key=lambda row: found.rows[row][0])
    table = torch.tensor([found.rows[row] for row in order], dtype=torch.float64).reshape(-1, 8)
    ends = torch.bincount(table[:, 0].long(), minlength=len(files)).cumsum(0)
    packed = [found.masks[row] for row in order] if masks else []
    annotations = Annotations(
        boxes=table[:, 1:5].float(),
        labels=table[:, 5].long(),
        areas=table[:, 6].float(),
        crowds=table[:, 7].long(),
        masks=b"".join(packed) if masks else None,
        mask_ends=torch.tensor([*map(len, packed)], dtype=torch.int64).cumsum(0),
    )
    return CocoImages(
        paths=[file.path for file in files.values()],
        ids=torch.tensor(list(files)),
        sizes=torch.tensor([(file.height, file.width) for file in files.values()]),
        rows=torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1),
        annotations=annotations,
    )


def _id(entry: Any) -> int | None:
    number = entry.get("id") if isinstance(entry, dict) else None
    return number if type(number) is int and number.bit_length() <= 63 else None


def _by_id(kind: str, entries: list[Any], problems: list[str]) -> dict[int, dict[str, Any]]:
    """Entries of a file by id, in its order; what has no id of its own is a problem."""
    found: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(entries, 1):
        number = _id(entry)
        if number is None:
            problems.append(f"the {kind} at place {place} has no whole number as id")
        elif number in found:
            problems.append(f"{kind} {number} is there twice")
        else:
            found[number] = entry
    return found


def _categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """Names by id, in the order of the ids; nothing can be left out here, as all labels would change."""
    problems: list[str] = []
    names: dict[int, str] = {}
    for number, entry in sorted(_by_id("category", entries, problems).items()):
        names[number] = entry.get("name", "")
        if not isinstance(names[number], str) or not names[number]:
            problems.append(f"category {number} has no name")
    if problems or not names:
        raise ValueError(f"{path}: {problems[0] if problems else 'it has no categories'}")
    return names


def _image_files(
    folder: Path, entries: dict[int, dict[str, Any]], problems: list[str], within: Path | None
) -> dict[int, _ImageFile | None]:
    """Files by image id; None is one that cannot be used, which is a problem."""
    files: dict[int, _ImageFile | None] = {}
    # A look into each folder is faster than one at each file. Names are looked up in the form that they have in common.
    listings: dict[str, dict[str, str]] = {}
    count = 0
    for image_id, entry in entries.items():
        files[image_id] = None
        name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
        if not isinstance(name, str):
            problems.append(f"image {image_id} has no file_name")
            continue
        if not (type(height) is type(width) is int and min(height, width) > 0):
            problems.append(f"image {image_id} has no height and width in whole pixels")
            continue
        path = os.path.join(folder, name)  # noqa: PTH118 - Path is slow for many files
        if within is not None and _leads_out(name, path, within):
            problems.append(
                f"image {image_id}: its file_name {name!r} leads out of {within} (--data.outside=true allows it)"
            )
            continue
        parent, base = os.path.split(path)
        if parent not in listings:
            listings[parent] = _files_in(parent)
        names = listings[parent]
        found = names.get(base) or names.get(unicodedata.normalize("NFC", base))
        if found is None:
            problems.append(f"image {image_id}: {path} is missing{_folded(base, names)}")
            continue
        files[image_id] = _ImageFile(count, os.path.join(parent, found), height, width)  # noqa: PTH118
        count += 1
    return files


def _leads_out(name: str, path: str, within: Path) -> bool:
    """Whether an image's name leads out of a folder by itself; links that somebody has put there are followed."""
    if not os.path.isabs(name) and ".." not in Path(name).parts:  # noqa: PTH117
        return False
    return not Path(path).resolve().is_relative_to(within.resolve())


def _files_in(folder: str) -> dict[str, str]:
    """The files of a folder, without pipes and the like, by their names as they are and in the common Unicode form."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except (OSError, ValueError):  # it is not there, or no folder has such a name
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names} | {name: name for name in names}


def _folded(base: str, names: dict[str, str]) -> str:
    """A hint at the one name that differs in capitals alone."""
    found = [name for name in names if name.lower() == base.lower()]
    return f"; did you mean {found[0]!r}?" if found else ""


def _looked_up(known: dict[int, T], entry: dict[str, Any], key: str) -> T:
    """What an annotation refers to."""
    number = entry.get(key)
    if type(number) is not int or number not in known:
        raise ValueError(f"its {key} {number!r} is not in the file")
    return known[number]


def _region(entry: dict[str, Any], file: _ImageFile, cut: bool) -> tuple[tuple[float, ...], float, int]:
    """Box, area and whether it is a crowd, of an annotation."""
    box, crowd = entry.get("bbox", []), entry.get("iscrowd", 0)
    if not is_numbers(box) or len(box) != 4:
        raise ValueError(f"its box {box!r} is not x, y, width, height")
    left, top, width, height = box
    right, bottom = left + width, top + height
    if min(left, top) < -TOLERANCE or right > file.width + TOLERANCE or bottom > file.height + TOLERANCE:
        raise ValueError(f"its box {box} leaves its image of {file.width} x {file.height} pixels")
    inside = max(left, 0), max(top, 0), min(right, file.width), min(bottom, file.height)
    if min(inside[2] - inside[0], inside[3] - inside[1]) < SMALLEST_SIDE:
        raise ValueError(f"its box {box} is inverted or has no area")
    area = entry.get("area")
    if area is None:
        area = width * height
    if not is_numbers([area]) or area < 0:
        raise ValueError(f"its area {area!r} is not a number from 0 on")
    if crowd not in (0, 1):
        raise ValueError(f"its iscrowd {crowd!r} is neither 0 nor 1")
    return inside if cut else (left, top, right, bottom), area, int(crowd)


def _report(path: Path, problems: list[str], bad: Literal["refuse", "skip"]) -> None:
    if not problems:
        return
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    listed = "; ".join(problems[:10]) + more
    if bad == "refuse":
        raise ValueError(f"{path}: {listed}: repair them, or leave them out with --data.bad_annotations=skip")
    warnings.warn(f"{path}: {len(problems)} images or annotations are left out: {listed}", stacklevel=3)

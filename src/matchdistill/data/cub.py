"""CUB-200-2011, birds of 200 species, as its authors distribute it.

Lists with lines "ID VALUE" beside the folder ``images``: of the images, their classes (from 1 on), and whether they
are for training.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch

from matchdistill.data.archives import extract_once
from matchdistill.data.folder import ImageFiles, walk
from matchdistill.files import read_text
from matchdistill.messages import cause

CUB_SIZES = (5_994, 5_794, 200)  # training images, test images, classes

FOLDER, ARCHIVE = "CUB_200_2011", "CUB_200_2011.tgz"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
AGAIN = f"remove the folder and extract {ARCHIVE} again"


def find_cub(root: Path) -> Path:
    """The folder with the lists: ``root``, or one in it, or beside or from an archive, which is extracted if need be.

    Raises:
        ValueError: in one line, that there is no such folder or archive, or why it cannot be extracted.
    """
    base, archive = (root.parent, root) if root.is_file() else (root, root / ARCHIVE)
    folder = base / FOLDER
    # The second is made by tools that extract into a folder of the archive's name.
    for place in (folder, folder / FOLDER, base):
        if any((place / name).is_file() for name in LISTS):
            return place
    if archive.is_file():
        extract_once(archive, folder, lambda partial: _extract(archive, partial))
        return folder
    parent = root.absolute().parent
    meant = parent if (parent / LISTS[0]).is_file() else parent / ARCHIVE
    hint = f"; did you mean {str(meant)!r}?" if meant.exists() else ""
    raise ValueError(
        f"cub200: {root} has neither {LISTS[0]} nor a folder {FOLDER} with it nor {ARCHIVE}: give the folder with one "
        f"of them as data.root{hint}"
    )


def _extract(archive: Path, partial: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    if not (partial / FOLDER).is_dir():
        raise ValueError(f"cub200: {archive} holds no folder {FOLDER}: it is not the archive of this data set")
    return partial / FOLDER


def read_cub(folder: Path) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """Training images, test images and class names.

    Raises:
        ValueError: in one line, what is missing, malformed or contradictory.
    """
    names, labels, training, classes = (_read_list(folder / name) for name in LISTS)
    for name, other in ((LISTS[1], labels), (LISTS[2], training)):
        if lone := sorted(names.keys() ^ other.keys()):
            raise ValueError(f"{folder}: image {lone[0]} is only in one of {LISTS[0]} and {name}: {AGAIN}")
    numbers = {class_id: number for number, class_id in enumerate(sorted(classes))}
    paths: tuple[list[str], list[str]] = [], []  # training, test
    targets: tuple[list[int], list[int]] = [], []
    for image, name in sorted(names.items()):
        class_id, flag = labels[image], training[image]
        # The folder of an image has the name of its class.
        if not class_id.isdecimal() or classes.get(int(class_id)) != name.partition("/")[0] or flag not in ("0", "1"):
            raise ValueError(
                f"{folder}: image {image} is {name!r} of class {class_id!r} with training flag {flag!r}, which does not "
                f"fit {LISTS[3]} and flags of 0 and 1: {AGAIN}"
            )
        paths[flag == "0"].append(str(folder / "images" / name))
        targets[flag == "0"].append(numbers[int(class_id)])
    if (sizes := (len(paths[0]), len(paths[1]), len(classes))) != CUB_SIZES:
        raise ValueError(
            "{} has {} training images, {} test images and {} classes, but the data set {}, {} and {}: {}".format(
                folder, *sizes, *CUB_SIZES, AGAIN
            )
        )
    # One look into each folder is faster than one at each image, above all on network disks.
    there = set(walk(folder / "images", [])) if (folder / "images").is_dir() else set()
    if missing := [path for split in paths for path in split if path not in there]:
        raise ValueError(f"{len(missing)} of the {len(names)} images are missing, {missing[0]} for one: {AGAIN}")
    train, test = (ImageFiles(paths[split], torch.tensor(targets[split])) for split in (0, 1))
    return train, test, [classes[class_id] for class_id in numbers]


def _read_list(path: Path) -> dict[int, str]:
    """The values of a list by ID."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({cause(error)}): {AGAIN}") from error
    values: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value or int(key) in values:
            raise ValueError(f"{path}, line {number} is {line!r}: expected ID VALUE, each ID once: {AGAIN}")
        values[int(key)] = value
    return values

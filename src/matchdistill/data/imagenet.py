"""ImageNet (ILSVRC 2012) from its official archives, which torchvision checks and extracts into class folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torchvision.datasets import imagenet

from matchdistill.data.archives import extract_once
from matchdistill.data.folder import VAL_NAMES, did_you_mean_folder, val_folder
from matchdistill.data.pictures import IMAGE_SUFFIXES


def extract_imagenet(root: Path) -> Path:
    """``root``, after ``train/`` and ``val/`` were extracted where they are absent.

    Raises:
        ValueError: in one line, what is missing, half extracted or damaged.
    """
    if not root.is_dir():
        return root  # which find_images refuses
    train_tar, val_tar, devkit = (root / imagenet.ARCHIVE_META[part][0] for part in ("train", "val", "devkit"))
    missing, absent = [], []
    for folder, names, archives in (
        (root / "train", "train/", [train_tar]),
        (val_folder(root), "/ or ".join(VAL_NAMES) + "/", [val_tar, devkit]),
    ):
        if not folder.is_dir():
            absent.append((folder, archives))
            if lacking := [archive.name for archive in archives if not archive.is_file()]:
                missing.append(f"no {names} and to extract it no {' and no '.join(lacking)}")
        elif loose := _loose_file(folder):
            told = f"{folder} is half extracted, {loose} is in no class folder"
            if all(archive.is_file() for archive in archives):
                told += f": remove {folder}, and it is extracted anew from {_listed(archives)} in {root}"
            else:
                told += (
                    f": sort the images into class folders, or put {_listed(archives)} into {root} and remove {folder}"
                )
            raise ValueError(told)
    if missing:
        raise ValueError(f"imagenet: {root} has {', '.join(missing)}{did_you_mean_folder(root)}")
    for folder, archives in absent:  # not before all is there, as it takes long
        extract_once(archives[0], folder, partial(_extract, archives))
    return root


def _listed(archives: list[Path]) -> str:
    return " with ".join(archive.name for archive in archives)


def _loose_file(folder: Path) -> str | None:
    """An image or archive beside class folders or instead of them, as other tools leave when they are interrupted."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix.lower() in {".tar", *IMAGE_SUFFIXES}]
    except OSError:
        return None  # find_images says why
    return min((path.name for path in paths if not path.name.startswith(".")), default=None)


def _extract(archives: list[Path], place: Path) -> Path:
    """The folder made in ``place`` of the training archive, or of the validation archive with the devkit."""
    archive, *devkit = archives
    if not devkit:
        _parse(imagenet.parse_train_archive, archive, place)
        return place / "train"
    _parse(imagenet.parse_devkit_archive, devkit[0], place)
    _parse(imagenet.parse_val_archive, archive, place)
    return place / "val"


def _parse(parse: Callable[..., None], archive: Path, place: Path) -> None:
    try:
        parse(str(place), file=str(archive.resolve()))
    except RuntimeError as error:  # of its MD5 sum
        raise ValueError(
            f"{archive} is damaged or not the official file, going by its MD5 sum: get it again"
        ) from error

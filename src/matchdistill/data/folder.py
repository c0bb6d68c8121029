"""Images in folders, one folder for each class.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from matchdistill.data.augmenting import PLAIN, Variation
from matchdistill.data.loading import Batch
from matchdistill.data.pictures import IMAGE_SUFFIXES, Picture, Place, read_picture
from matchdistill.data.reading import FileDataset
from matchdistill.messages import cause, printable
from matchdistill.models.preparation import IMAGENET, Preparation

LISTED = 10  # names in an error
# Files that lie beside images and that nobody takes for some.
NOTES = {".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
VAL_NAMES = ("val", "valid", "validation")


@dataclass(frozen=True)
class ImageFiles:
    """Paths of N images, or what opens them, and labels (N,) int64; or (N, C) with a 1 for each class of an image."""

    paths: Sequence[Place]
    labels: Tensor

    def subset(self, index: Tensor) -> ImageFiles:
        """The images of ``index`` (M,)."""
        return ImageFiles([self.paths[i] for i in index.tolist()], self.labels[index])


def find_images(root: Path) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
    """Training images, validation images and class names of ``root/train/CLASS`` and ``root/val/CLASS``.

    There are no validation images (None) where there is no folder of them.

    Raises:
        ValueError: in one line, what is missing, empty, unreadable or only in the latter.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} {'is a file' if root.exists() else 'does not exist'}")
    train_root, val_root = root / "train", val_folder(root)
    if not train_root.exists():
        raise ValueError(f"{root} has no folder train{did_you_mean_folder(root)}")
    train = class_folders(train_root)
    val = class_folders(val_root) if val_root.exists() else None
    if val is not None and (strange := val.keys() - train.keys()):
        raise ValueError(
            f"{train_root} and {val_root} must have the same class folders: "
            f"only in {train_root}: {some(train.keys() - val.keys())}; "
            f"only in {val_root}: {some(strange)}"
        )
    class_names = sorted(train)
    paths, labels = scan([train[name] for name in class_names])
    if empty := sorted(set(range(len(class_names))) - set(labels)):
        raise no_images(f"class folder {train_root / class_names[empty[0]]}")
    train_files = ImageFiles(paths, torch.tensor(labels))
    if val is None:
        return train_files, None, class_names
    paths, labels = scan([val.get(name) for name in class_names])
    if not labels:
        raise no_images(f"class folder {val_root / class_names[0]}")
    return train_files, ImageFiles(paths, torch.tensor(labels)), class_names


def no_images(folder: str) -> ValueError:
    """What is wrong with a folder, given in words, that has none."""
    return ValueError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): add some or remove the folder")


def some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    ordered = sorted(names)
    listed = ", ".join(ordered[:LISTED]) or "none"
    return f"{listed} and {len(ordered) - LISTED} more" if len(ordered) > LISTED else listed


def val_folder(root: Path) -> Path:
    """The folder of the validation images, which goes by several names."""
    return next((root / name for name in VAL_NAMES if (root / name).is_dir()), root / VAL_NAMES[0])


def did_you_mean_folder(root: Path) -> str:
    """``; did you mean '/data'?`` for a root that is one step too deep or not deep enough, or nothing."""
    root = root.absolute()
    places = [root.parent / "train"] if root.name in ("train", *VAL_NAMES) else []
    found = next((place for place in places + sorted(root.glob("*/train")) if place.is_dir()), None)
    return f"; did you mean {str(found.parent)!r}?" if found else ""


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes by the classes' names, which are the same whatever Unicode form they have on the disk."""
    try:
        paths = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"image folder {folder} cannot be read ({cause(error)})") from error
    if not paths:
        raise ValueError(f"image folder {folder} has no class folders: expected {folder}/CLASS/IMAGE.jpg")
    named: dict[str, Path] = {}
    places: set[Path] = set()
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):  # so that it is the link that is refused
        name = same_name(path.name)
        if name in named:
            raise ValueError(
                f"{path} and {named[name]} have the same name in two Unicode forms: make one folder of them"
            )
        place = path.resolve()
        if folder.resolve().is_relative_to(place) or place in places:
            raise ValueError(
                f"class folder {path} is a link to {place}, whose images are in the set already: remove the link"
            )
        places.add(place)
        named[name] = path
    return named


def same_name(name: str) -> str:
    """A file's name in the one form that names which look alike have in common, as any page can show it."""
    return printable(unicodedata.normalize("NFC", name))


def scan(folders: Sequence[Path | None]) -> tuple[list[str], list[int]]:
    """All images of class folders in turn, and their labels; a warning tells what is left out."""
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    links: list[str] = []
    for label, folder in enumerate(folders):
        if folder is None:
            continue
        found = []
        for path in walk(folder, links):
            suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - Path is slow for a million files
            if suffix in IMAGE_SUFFIXES:
                found.append(path)
            elif suffix not in NOTES:
                others[suffix or "no ending"] += 1
        paths += sorted(found)
        labels += [label] * len(found)
    if others:
        listed = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(LISTED))
        warnings.warn(
            f"files that are no images of a known type are left out, by the ends of their names: {listed}", stacklevel=3
        )
    if links:
        warnings.warn(f"{len(links)} links to folders that are read already are left out: {some(links)}", stacklevel=3)
    return paths, labels


def walk(folder: Path, left_out: list[str]) -> Iterator[str]:
    """The paths of all files below a folder, hidden ones left out, each folder once however many links lead to it.

    Args:
        folder: where to begin.
        left_out: is given the links that were not followed.

    Raises:
        ValueError: a folder cannot be read.
    """
    around = {os.path.realpath(parent) for parent in folder.resolve().parents}
    seen: set[str] = set()
    # Links come last, so that it is them that are left out.
    folders, links = [os.fspath(folder)], list[str]()
    while folders or links:
        linked = not folders
        path = (folders or links).pop(0)
        real = os.path.realpath(path)
        if real in seen or real in around:
            if linked:
                left_out.append(path)
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(entry.path)
                    else:
                        yield entry.path
        except OSError as error:
            raise ValueError(f"image folder {path} cannot be read ({cause(error)})") from error


class FolderDataset(FileDataset):
    """Images read from files when they are asked for, with their labels.

    Args:
        files: the images.
        transform: from a PIL image to a tensor (3, H, W).
        skip_corrupt: as :class:`FileDataset` has it.
        fewest: likewise.
        read: likewise.
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: Callable[[Image.Image], Tensor],
        skip_corrupt: bool,
        fewest: int = 1,
        read: Callable[[Place], Picture] = read_picture,
    ) -> None:
        super().__init__(files.paths, skip_corrupt, fewest, read)
        self.files = files
        self.transform = transform

    def _sample(self, index: int, picture: Picture) -> tuple[Tensor, Tensor]:
        """One image (3, H, W) and its label."""
        return self.transform(picture.image), self.files.labels[index]

    def _batch(self, samples: list[tuple[Tensor, Tensor]]) -> Batch:
        """Images (N, 3, H, W) and labels (N,), or (N, C) of several classes an image."""
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels)


def image_transform(
    size: int, augment: bool, flip: bool = True, variation: Variation = PLAIN, preparation: Preparation = IMAGENET
) -> Callable[[Image.Image], Tensor]:
    """What makes an image ready for a network: a random crop and flip for training, else the middle of the resized image.

    Args:
        size: height and width of the result in pixels.
        augment: whether the image is cropped at random.
        flip: whether half of the images are then mirrored too.
        variation: what is done to them besides.
        preparation: how the network wants them.
    """
    from torchvision.transforms import v2

    cropped = v2.RandomResizedCrop(
        size, variation.crop_scale, interpolation=v2.InterpolationMode(preparation.interpolation)
    )
    crop = [cropped, *([v2.RandomHorizontalFlip()] if flip else [])] if augment else preparation.cut(size)
    normalised = v2.Normalize(preparation.mean, preparation.std)
    values = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalised]
    transform: Callable[[Image.Image], Tensor] = v2.Compose([*crop, *variation.pixels, *values, *variation.values])
    return transform

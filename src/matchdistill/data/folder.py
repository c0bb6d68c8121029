"""Images in folders, one folder for each class.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from matchdistill.data.loading import Batch
from matchdistill.data.reading import FileDataset
from matchdistill.data.tensors import IMAGENET_MEAN, IMAGENET_STD
from matchdistill.messages import cause

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LISTED = 10  # names in an error
VAL_NAMES = ("val", "valid", "validation")


@dataclass(frozen=True)
class ImageFiles:
    """Paths of N images and labels (N,) int64."""

    paths: list[str]
    labels: Tensor

    def subset(self, index: Tensor) -> ImageFiles:
        """The images of ``index`` (M,)."""
        return ImageFiles([self.paths[i] for i in index.tolist()], self.labels[index])


def find_images(root: Path) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """Training images, validation images and class names of ``root/train/CLASS`` and ``root/val/CLASS``.

    Raises:
        ValueError: in one line, what is missing, empty, unreadable or not alike in both.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} {'is a file' if root.exists() else 'does not exist'}")
    val_root = val_folder(root)
    for folder in (root / "train", val_root):
        if not folder.exists():
            raise ValueError(f"{root} has no folder {folder.name}{did_you_mean_folder(root)}")
    class_names, val_names = _class_names(root / "train"), _class_names(val_root)
    if class_names != val_names:
        raise ValueError(
            f"{root / 'train'} and {val_root} must have the same class folders: "
            f"only in {root / 'train'}: {_some(set(class_names) - set(val_names))}; "
            f"only in {val_root}: {_some(set(val_names) - set(class_names))}"
        )
    return _scan(root / "train", class_names), _scan(val_root, class_names), class_names


def _some(names: set[str]) -> str:
    """The first few, and how many more there are."""
    listed = ", ".join(sorted(names)[:LISTED]) or "none"
    return f"{listed} and {len(names) - LISTED} more" if len(names) > LISTED else listed


def val_folder(root: Path) -> Path:
    """The folder of the validation images, which goes by several names."""
    return next((root / name for name in VAL_NAMES if (root / name).is_dir()), root / VAL_NAMES[0])


def did_you_mean_folder(root: Path) -> str:
    """``; did you mean '/data'?`` for a root that is one step too deep or not deep enough, or nothing."""
    root = root.absolute()
    places = [root.parent / "train"] if root.name in ("train", *VAL_NAMES) else []
    found = next((place for place in places + sorted(root.glob("*/train")) if place.is_dir()), None)
    return f"; did you mean {str(found.parent)!r}?" if found else ""


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"image folder {folder} cannot be read ({cause(error)})") from error
    if not names:
        raise ValueError(f"image folder {folder} has no class folders: expected {folder}/CLASS/IMAGE.jpg")
    return names


def _scan(folder: Path, class_names: list[str]) -> ImageFiles:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _image_paths(folder / name)
        if not found:
            raise ValueError(
                f"class folder {folder / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): "
                "add some or remove the folder"
            )
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, torch.tensor(labels))


def _image_paths(folder: Path) -> list[str]:
    """All images below ``folder``, hidden files and folders left out, in an order that is the same everywhere."""

    def stop(error: OSError) -> None:
        raise ValueError(f"image folder {error.filename} cannot be read ({cause(error)})") from error

    paths = []
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            os.path.join(parent, name)  # noqa: PTH118 - Path is slow for a million files
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
        ]
    return sorted(paths)


class FolderDataset(FileDataset):
    """Images read from files when they are asked for, with their labels.

    Args:
        files: the images.
        transform: from a PIL image to a tensor (3, H, W).
        skip_corrupt: as :class:`FileDataset` has it.
        fewest: likewise.
    """

    def __init__(
        self, files: ImageFiles, transform: Callable[[Image.Image], Tensor], skip_corrupt: bool, fewest: int = 1
    ) -> None:
        super().__init__(files.paths, skip_corrupt, fewest)
        self.files = files
        self.transform = transform

    def _sample(self, index: int, image: Image.Image) -> tuple[Tensor, int]:
        """One image (3, H, W) and its label."""
        return self.transform(image), int(self.files.labels[index])

    def _batch(self, samples: list[tuple[Tensor, int]]) -> Batch:
        """Images (N, 3, H, W) and labels (N,)."""
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)


def uncropped(size: int) -> int:
    """Pixels of the shorter side that an image is resized to before its middle is taken."""
    return round(size * 256 / 224)


def image_transform(size: int, augment: bool) -> Callable[[Image.Image], Tensor]:
    """ImageNet's usual preparation: a random crop and flip for training, else the middle of the resized image."""
    from torchvision.transforms import v2

    crop = (
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        if augment
        else [v2.Resize(uncropped(size)), v2.CenterCrop(size)]
    )
    transform: Callable[[Image.Image], Tensor] = v2.Compose(
        [*crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    return transform

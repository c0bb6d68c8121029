"""Classes of images: their order, which of them lack images, and validation images out of the training images.

Axes: N images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

from matchdistill.data.folder import ImageFiles, some
from matchdistill.data.loading import mix_seed
from matchdistill.data.pictures import Place

Labelled = Sequence[tuple[Place, str]]  # images, each with the name of its class
Several = Sequence[tuple[Place, Sequence[str]]]  # images, each with the names of all of its classes


def split_off(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices, ascending, of training images and of a random share (at least one image) of each class.

    The choice is the same at each call. A class of one image keeps it for training.

    Args:
        labels: of the images, (N,) int64.
        share: of each class, between 0 and 1.

    Raises:
        ValueError: no class has two images.

    Examples:
        >>> labels = torch.tensor([0] * 8 + [1] * 4 + [2])
        >>> train, val = split_off(labels, 0.25)
        >>> len(train), labels[val].tolist()
        (10, [0, 0, 1])
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(mix_seed("validation share")))
    by_class = torch.split(order[labels[order].argsort(stable=True)], labels.bincount().tolist())
    counts = [min(max(round(share * len(members)), 1), len(members) - 1) if len(members) else 0 for members in by_class]
    if not sum(counts):
        each = "each class has" if len(counts) > 1 else "there is"
        raise ValueError(f"no image can be split off for validation, as {each} only one: give validation images")
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members, count in zip(by_class, counts, strict=True):
        chosen[members[:count]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def named_classes(
    train: Labelled, val: Labelled | None, source: str
) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
    """Images by class, in each class in the order that is given, and the names of the classes.

    Names that are all whole numbers are in the order of the numbers, others in the order of the alphabet.

    Args:
        train: training images.
        val: validation images; None: there are none.
        source: what they are read from, for errors.

    Raises:
        ValueError: there are no images, or classes without training images.
    """
    if not train:
        raise ValueError(f"{source} has no training images")
    if val is not None and not val:
        raise ValueError(f"{source} has no validation images")
    found = {name for _, name in train}
    class_names = named_order(found)
    if strange := {name for _, name in val or ()} - found:
        raise ValueError(f"{source} has validation images of classes without training images: {some(strange)}")
    places = {name: label for label, name in enumerate(class_names)}
    train_files, *others = (
        in_order([(image, places[name]) for image, name in split]) for split in (train, val) if split is not None
    )
    return train_files, others[0] if others else None, class_names


def several_classes(
    train: Several, val: Several | None, source: str, known: Sequence[str] | None = None
) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
    """Images with any number of classes each, in the order that is given, and the names of the classes in `named_order`.

    Args:
        train: training images.
        val: validation images; None: there are none.
        source: what they are read from, for errors.
        known: all classes in their order; None: the classes of the training images.

    Returns:
        The images, whose labels (N, C) uint8 have a 1 for each class of an image, and the names.

    Raises:
        ValueError: there are no images, no classes, or classes without training images.
    """
    if not train:
        raise ValueError(f"{source} has no training images")
    found = {name for _, names in train for name in names}
    class_names = named_order(found) if known is None else list(known)
    if not class_names:
        raise ValueError(f"{source} has no training image with a label")
    if strange := {name for _, names in val or () for name in names} - set(class_names):
        raise ValueError(f"{source} has validation images of classes without training images: {some(strange)}")
    places = {name: label for label, name in enumerate(class_names)}

    def marked(images: Several) -> ImageFiles:
        labels = torch.zeros(len(images), len(places), dtype=torch.uint8)
        for row, (_, names) in enumerate(images):
            labels[row, [places[name] for name in names]] = 1
        return ImageFiles([place for place, _ in images], labels)

    return marked(train), None if val is None else marked(val), class_names


def named_order(names: Iterable[str]) -> list[str]:
    """Names of classes in order: by number if all are whole numbers, else by the alphabet.

    Examples:
        >>> named_order(["10", "9"]), named_order(["10", "9", "a"])
        (['9', '10'], ['10', '9', 'a'])
    """
    found = set(names)
    numbers = all(name.isascii() and name.isdecimal() for name in found)
    return sorted(found, key=(lambda name: (int(name), name)) if numbers else None)


def in_order(images: Iterable[tuple[Place, int]]) -> ImageFiles:
    """Images with labels as `ImageFiles`, by label; of one label in the order that is given."""
    ordered = sorted(images, key=lambda image: image[1])
    return ImageFiles([place for place, _ in ordered], torch.tensor([label for _, label in ordered]))


def tell_missing(labels: Tensor, class_names: Sequence[str], source: str, consequence: str) -> None:
    """Warn of classes that have no images.

    Args:
        labels: of the images, (N,) int64.
        class_names: of all classes.
        source: where the images are from, as the warning calls it.
        consequence: what follows.
    """
    seen = set(labels.tolist())
    if lacking := [name for label, name in enumerate(class_names) if label not in seen]:
        warnings.warn(
            f"{source} has no images of {len(lacking)} of {len(class_names)} classes ({some(lacking)}): {consequence}",
            stacklevel=2,
        )

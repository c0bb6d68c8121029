"""The data module of the classification task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from matchdistill.data.augmenting import PLAIN, AugmentingOptions, variation
from matchdistill.data.classes import split_off, tell_missing
from matchdistill.data.cub import find_cub, read_cub
from matchdistill.data.folder import FolderDataset, ImageFiles, find_images, image_transform
from matchdistill.data.hub import HubSet
from matchdistill.data.imagenet import extract_imagenet
from matchdistill.data.module import DataModule, Sources, path_problems
from matchdistill.data.own import OwnSet, PreparedDataset
from matchdistill.data.shards import Shards
from matchdistill.data.tables import Table
from matchdistill.data.tensors import (
    FASHION_CLASSES,
    GrayImages,
    TensorDataset,
    find_fashion_mnist,
    load_digits,
    load_fashion_mnist,
)
from matchdistill.files import path_of
from matchdistill.messages import did_you_mean, listed, number, whole
from matchdistill.models.preparation import IMAGENET, LARGEST_IMAGE, Preparation

Images = GrayImages | ImageFiles
Split = tuple[Images, Images | None, list[str]]  # training images, validation images if there are some, class names
Place = Any  # the path of a data set, or what reads it; None where it is part of a library

# Of `ImageData.described`, each value with its kind for `files.is_kind`.
DESCRIPTION: dict[str, Any] = {"image_size": int, "preparation": dict, "gray": bool}


@dataclass(frozen=True)
class ImageSet:
    """A data set that `ImageData` knows by name.

    Attributes:
        size: height and width in pixels that its images have if nothing else is said.
        read: from where `locate` has found it to training images, validation images and names of the classes.
        root: what the user has to give as `data.root`; empty: the set can do without.
        locate: finds it, after downloading or extracting what has to be: (root, all options) -> place.
        small: whether `read` gives `GrayImages`, which are kept in memory and resized whole, instead of `ImageFiles`, which
            are cropped.
        flip: whether training images are mirrored if they are varied.
        options: whether it takes ``data.options``.
        takes: which of the options in `OF_SOME` it takes.
        own: whether a function of the user's own reads it.
    """

    size: int
    read: Callable[[Place], Split]
    root: str = ""
    locate: Callable[[Any, ImageOptions], Place] = lambda root, _: root
    small: bool = False
    flip: bool = True
    options: bool = False
    own: bool = False
    takes: tuple[str, ...] = ()


COLUMNS = ("image_column", "label_column", "train_split", "val_split")
OF_SOME = ("download", "val_root", "split_column", *COLUMNS)  # what only some sets take, and no other may ignore


def _read_digits(_: Place) -> Split:
    return *load_digits(), [str(digit) for digit in range(10)]


def _read_fashion_mnist(folder: Place) -> Split:
    return *load_fashion_mnist(folder), FASHION_CLASSES.copy()


def _table(root: Path | None, options: ImageOptions) -> Table:
    assert root is not None
    return Table(
        root,
        None if options.val_root is None else path_of(options.val_root),
        options.image_column or "path",
        options.label_column or "label",
        options.split_column,
        options.train_split,
        options.val_split,
    )


def _hub(root: Path | None, options: ImageOptions) -> HubSet:
    assert root is not None
    return HubSet(
        root, options.options, options.image_column, options.label_column, options.train_split, options.val_split
    )


def _shards(root: Path | None, options: ImageOptions) -> Shards:
    assert root is not None
    return Shards(root, None if options.val_root is None else path_of(options.val_root))


def _own(root: Path | None, options: ImageOptions) -> OwnSet:
    return OwnSet(options.name, options.options if root is None else {"root": str(root), **options.options})


IMAGE_SETS = {
    "digits": ImageSet(16, _read_digits, small=True, flip=False),
    "fashion-mnist": ImageSet(
        32,
        _read_fashion_mnist,
        locate=lambda root, options: find_fashion_mnist(root, options.download),
        small=True,
        takes=("download",),
    ),
    "folder": ImageSet(224, find_images, "the folder that holds train/ and val/"),
    "imagenet": ImageSet(
        224,
        find_images,
        "the folder that holds train/ and val/, or the official archives",
        locate=lambda root, _: extract_imagenet(root),
    ),
    "csv": ImageSet(
        224,
        Table.read,
        "the file with columns of paths and labels",
        locate=_table,
        takes=("val_root", "split_column", *COLUMNS),
    ),
    "datasets": ImageSet(
        224,
        HubSet.read,
        "a saved data set, a folder, a file or a name of the Hub",
        _hub,
        options=True,
        takes=COLUMNS,
    ),
    "webdataset": ImageSet(
        224, Shards.read, "a folder of .tar files, or a pattern of their names", _shards, takes=("val_root",)
    ),
    "cub200": ImageSet(224, read_cub, "the folder CUB_200_2011, or its archive", locate=lambda root, _: find_cub(root)),
}

# A function of the user's own.
OWN = ImageSet(224, OwnSet.read, locate=_own, options=True, own=True)


def image_set(name: str) -> ImageSet | None:
    """The set of a name or of ``package.module:function``; None if it is neither."""
    module, _, function = name.partition(":")
    return IMAGE_SETS.get(name) or (OWN if module and function else None)


@dataclass
class ImageOptions(AugmentingOptions):
    """Images with labels, as three channels with the mean and deviation that the network wants.

    `ImageData` takes these options and the ones of `AugmentingOptions` and `DataOptions`.

    Args:
        name: ``digits`` (built in), ``fashion-mnist``, ``folder`` for ``ROOT/train/CLASS/*.jpg`` and
            ``ROOT/val/CLASS/*.jpg`` (or ``valid``, ``validation``), ``imagenet`` for the same or the official archives,
            ``cub200`` for CUB-200-2011, ``csv`` for a table of paths and labels in ``.csv``, ``.tsv`` or ``.parquet``,
            ``datasets`` for a data set of Hugging Face: a folder that ``save_to_disk`` has written, any folder or file that
            ``load_dataset`` takes, or a name of the Hub,
            ``webdataset`` for ``.tar`` files of NAME.jpg and NAME.cls: a folder of ``train*.tar`` and ``val*.tar``, or a
            pattern like ``train-{000..099}.tar`` or ``train-*.tar`` with another one as ``val_root``.
            What is in archives is extracted beside them, once. ``package.module:function`` is a function of your own; see
            ``options``.
        root: the folder or file with the data; ``digits`` needs none.
        image_size: height and width in pixels; by default 16 for digits, 32 for fashion-mnist, for the others what the
            library's weights of the student are for, or 224.
        augment: whether training images are varied at all: shifted (digits), shifted and mirrored (fashion-mnist), cropped
            and mirrored (the others), and as the other options say.
        download: whether fashion-mnist may be downloaded into ``root``.
        val_root: the validation images, where ``root`` has the training images alone: of csv the second file,
            of webdataset the second pattern.
        val_share: where there are no validation images, this share of the training images of each class is taken out for
            them; the choice is the same for every ``seed``.
        options: further arguments of ``load_dataset``, or of a function of your own, of which ``root`` is one too if it is
            given. Your function returns training set, validation set (or None) and class names: each set a
            ``torch.utils.data.Dataset`` of pairs (PIL image or tensor, label from 0 on). Or it returns a
            ``LightningDataModule`` with such data sets.
        prepared: whether tensors of a function of your own go to the network as they are, neither cropped nor normalised.
        image_column: the column with the images or their paths; null: ``path``,
            of datasets the one column of images.
        label_column: the column with the classes; null: ``label``, of datasets the one column of classes.
        split_column: the column that tells training from validation images; null: ``split`` if there is one.
        train_split: the name of the training images' split.
        val_split: the name of the validation images' split; null: ``val``, ``valid`` or ``validation``.
        train_part: [first, last]: of the training images in a balanced random order that is the same for every
            ``seed``, those from ``first`` to before ``last``; ``train_limit`` chooses among them. For disjoint images
            of teacher, pre-training and student.
        train_limit: use that many training images, a random choice by ``seed`` with equally many of each class.
    """

    cropped: ClassVar[bool] = False  # whether small images are cropped too
    sources: ClassVar[Sources] = {"torchvision": ("download",)}
    indifferent = AugmentingOptions.indifferent | {"root", "val_root", "download"}

    name: str = "digits"
    root: Path | None = None
    image_size: int | None = None
    augment: bool = True
    download: bool = False
    val_root: Path | None = None
    val_share: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    prepared: bool = False
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    train_split: str = "train"
    val_split: str | None = None

    @property
    def image_set(self) -> ImageSet | None:
        """The set of the name; None: there is none."""
        return image_set(self.name)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        chosen = self.image_set
        if chosen is None:
            yield (
                f"{prefix}.name is {self.name!r}: expected {', '.join(IMAGE_SETS)} or package.module:function"
                f"{did_you_mean(self.name, IMAGE_SETS)}"
            )
        elif self.root is None and (needed := chosen.root):
            yield f"{prefix}.name is {self.name!r}: give {needed} as {prefix}.root"
        elif chosen.small and self.crop_scale is not None and not self.cropped:
            yield f"{prefix}.crop_scale is of sets that are cropped: leave it out with {self.name}, whose images are shifted"
        if chosen is not None:
            yield from self._untaken(prefix, chosen)
        yield from whole(f"{prefix}.image_size", self.image_size, 1, LARGEST_IMAGE)
        if self.options and chosen is not None and not chosen.options:
            yield f"{prefix}.options is given, but {self.name!r} takes none: leave it out"
        if self.prepared and chosen is not None and not chosen.own:
            yield f"{prefix}.prepared is for functions of your own alone, not for {self.name!r}: leave it out"
        yield from number(f"{prefix}.val_share", self.val_share, 0, below=1, above=True)
        yield from super().problems(prefix)
        yield from path_problems(self.root)
        yield from path_problems(self.val_root)

    def _untaken(self, prefix: str, chosen: ImageSet) -> Iterator[str]:
        """The options that are given and that the set would ignore."""
        usual = {field.name: field.default for field in fields(ImageOptions)}
        given = [name for name in OF_SOME if getattr(self, name) != usual[name]]
        for name in given:
            if name not in chosen.takes:
                takers = listed([each for each, other in IMAGE_SETS.items() if name in other.takes])
                yield f"{prefix}.{name} is for {takers}, not for {self.name!r}: leave it out"
        if "val_root" in given and "split_column" in chosen.takes:
            for name in ("split_column", "train_split", "val_split"):
                if name in given:
                    yield (
                        f"{prefix}.{name} says which images are for validation, but these are those of {prefix}.val_root: "
                        "give one of them"
                    )


class ImageData(DataModule):
    """Images with labels, as three channels with ImageNet's mean and deviation, or as `prepare_as` says.

    Usable without a trainer too: call ``setup()``, which sets the attributes, then ask for loaders. Randomness is a
    function of seed, epoch and rank, and of the number of workers.

    Args:
        positional: the first options of `ImageOptions`, in their order.
        options: the others, by name.

    Attributes:
        options: all of them, as `ImageOptions`.
        image_size: height and width of the images in pixels.
        preparation: how the network wants them, see `prepare_as`.
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        train_set: the training images.
        train_labels: of all of them (N,).
        val_set: the validation images.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.

    Examples:
        >>> data = ImageData(train_limit=300, batch_size=100)
        >>> data.setup()
        >>> [images.shape for images, labels in data.train_dataloader()]
        [torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16]), torch.Size([100, 3, 16, 16])]
    """

    options_type = ImageOptions
    options: ImageOptions
    train_set: TensorDataset | FolderDataset
    train_labels: Tensor
    val_set: TensorDataset | FolderDataset

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, **options)
        self.root = None if self.options.root is None else path_of(self.options.root)
        self.prepare_as(IMAGENET)

    @property
    def prepares(self) -> bool:
        """Whether images are normalised; tensors with ``data.prepared`` are not."""
        return not self.options.prepared

    def prepare_as(self, preparation: Preparation) -> None:
        """Take how the network that is trained wants its images; else they are as ImageNet's usually are.

        Its size counts where ``data.image_size`` is not given. Small gray images get its mean and deviation alone: they are
        resized whole, bilinearly.

        Raises:
            ValueError: the images have been set up already.
        """
        if self.small:
            preparation = replace(preparation, interpolation="bilinear", crop_pct=1.0, crop_mode="center", size=None)
        self.image_size = self.options.image_size or preparation.size or self._set.size
        super().prepare_as(replace(preparation, size=self.image_size))

    @property
    def _set(self) -> ImageSet:  # not kept: a data module travels to other processes, and functions may not
        chosen = self.options.image_set
        assert chosen is not None
        return chosen

    @property
    def code(self) -> str:
        """The function of the user's own that gives the images; empty if there is none."""
        return self.options.name if self._set.own else ""

    def described(self) -> dict[str, Any]:
        """What has to be known of the images to use what was trained on them, as plain values; see `DESCRIPTION`."""
        return {"image_size": self.image_size, "preparation": self.preparation.plain(), "gray": self.small}

    @property
    def small(self) -> bool:
        """Whether the images are small gray ones, which are resized whole."""
        return self._set.small

    def prepare_data(self) -> None:
        """Download or extract, once per machine, what is to be downloaded or extracted."""
        self._set.locate(self.root, self.options)

    def _read(self) -> tuple[Images, Images, list[str]]:
        train, val, class_names = self._set.read(self._set.locate(self.root, self.options))
        source = self.options.name if self.root is None else str(self.root)
        tell_missing(self._classes(train), class_names, f"{source}, training,", "nothing is learned of these classes")
        if val is None:
            groups = self._groups(train)
            kept, taken = split_off(groups, self.options.val_share)
            stratified = ", of each class the same share" if groups.any() else ""
            warnings.warn(
                f"{source} has no validation images: {len(taken)} of its {len(train.labels)} training images are taken out "
                f"for validation{stratified} (data.val_share)",
                stacklevel=2,
            )
            train, val = train.subset(kept), train.subset(taken)
        tell_missing(self._classes(val), class_names, f"{source}, validation,", "these classes are not measured")
        return train, val, class_names

    def _groups(self, images: Images) -> Tensor:
        return images.labels

    def _classes(self, images: Images) -> Tensor:
        """The classes that images have, any number of times."""
        return images.labels

    def _dataset(self, images: Images, training: bool) -> TensorDataset | FolderDataset:
        if training:
            self.train_labels = images.labels
        augment = training and self.options.augment
        flip = augment and self._set.flip
        varied = variation(self.options) if augment else PLAIN
        if isinstance(images, ImageFiles) and self.options.prepared:
            return PreparedDataset(images, self.image_size, self.options.skip_corrupt, self.fewest if training else 1)
        if isinstance(images, ImageFiles):
            fewest = self.fewest if training else 1
            transform = image_transform(self.image_size, augment, flip, varied, self.preparation)
            return FolderDataset(images, transform, self.options.skip_corrupt, fewest, self.read)
        # An eighth: 1 px of the original digits, 4 px of Fashion-MNIST at 32 px. Digits must not be mirrored.
        shift = self.image_size // 8 if augment else 0
        return TensorDataset(images.resized(self.image_size), shift, flip, varied, self.preparation)

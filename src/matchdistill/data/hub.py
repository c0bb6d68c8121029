"""Data sets of the library `datasets` of Hugging Face: saved ones, folders of images, files, and names of the Hub."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from matchdistill.data.classes import in_order, named_classes, several_classes
from matchdistill.data.folder import VAL_NAMES, ImageFiles
from matchdistill.files import open_file
from matchdistill.messages import cause, did_you_mean, listed

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes of several splits, and of one
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True, slots=True)
class Row:
    """An image in a row of a data set, as `Stored` has it.

    Attributes:
        rows: the data set, with the column of images alone, which is not decoded.
        index: of the row.
        source: what messages call the data set.
    """

    rows: Any
    index: int
    source: str

    def __str__(self) -> str:
        return f"of row {self.index} of {self.source}"

    def open(self) -> BinaryIO:
        """The content of the image file."""
        (value,) = self.rows[self.index].values()
        if value is None:
            raise ValueError("the row has none")
        return open_file(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])


@dataclass(frozen=True)
class HubSet:
    """A data set that the library `datasets` loads.

    Attributes:
        root: a folder that ``save_to_disk`` has written, a folder or file that ``load_dataset`` takes, or a name of the Hub.
        options: further arguments of ``load_dataset``.
        image_column: the column of images; None: the one of this type.
        label_column: the column of classes; None: the one of this type.
        train_split: the split of the training images.
        val_split: the split of the validation images; None: any of `VAL_NAMES`.
        several: whether an image has a list of classes.
    """

    root: Path
    options: Mapping[str, Any]
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    several: bool = False

    def read(self) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
        """Training images, validation images (None if there is no such split) and class names.

        Raises:
            ValueError: in one line, why the data set cannot be loaded, or which split, column or label it lacks.
        """
        loaded = self._loaded()
        splits = dict(loaded) if isinstance(loaded, dict) else {self.train_split: loaded}
        names = VAL_NAMES if self.val_split is None else (self.val_split,)
        val_name = next((name for name in names if name in splits and name != self.train_split), self.val_split)
        for option, name in (("train_split", self.train_split), ("val_split", val_name)):
            if name is not None and name not in splits:
                raise ValueError(
                    f"{self.root} has no split {name!r}; its splits are {listed(map(repr, splits))}: name one of them as "
                    f"data.{option}{did_you_mean(name, splits)}"
                )
        train = splits[self.train_split]
        val = None if val_name is None else splits[val_name]
        image, label = self._columns(train)
        known = getattr(self._kind(train.features[label]), "names", None)
        if val is not None and any(val.features.get(name) != train.features[name] for name in (image, label)):
            raise ValueError(
                f"{self.root}: the columns {image!r} and {label!r} are not of the same type, with the same classes, in the "
                f"splits {self.train_split!r} and {val_name!r}"
            )
        train_rows = self._rows(train, self.train_split, image, label, known)
        val_rows = None if val is None else self._rows(val, str(val_name), image, label, known)
        if self.several:
            return several_classes(train_rows, val_rows, str(self.root), known)
        if known is None:
            return named_classes(train_rows, val_rows, str(self.root))
        places = {name: number for number, name in enumerate(known)}
        train_files, *others = (
            in_order((row, places[name]) for row, name in rows) for rows in (train_rows, val_rows) if rows is not None
        )
        return train_files, others[0] if others else None, list(known)

    def _loaded(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError("data.name is 'datasets': pip install 'matchdistill[datasets]'") from error
        root, place = self.root, str(self.root.absolute())
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            if any((root / name).is_file() for name in SAVED):
                return datasets.load_from_disk(place)
            if root.is_dir():
                return datasets.load_dataset(place, **self.options)
            if root.is_file() or root.suffix in BUILDERS:
                if root.suffix not in BUILDERS:
                    raise ValueError(f"expected a file that ends in {', '.join(BUILDERS)}")
                return datasets.load_dataset(BUILDERS[root.suffix], data_files=place, **self.options)
            if root.is_absolute() or len(root.parts) > 2:
                raise ValueError("there is no such folder or file")
            return datasets.load_dataset(root.as_posix(), **self.options)
        except Exception as error:  # the library, its readers and the network fail in every way
            hint = "" if root.exists() else ": check the path, or for a name of the Hub the network connection"
            raise ValueError(f"data set {root} cannot be loaded ({cause(error)}){hint}") from error

    def _columns(self, dataset: Any) -> tuple[str, str]:
        """The columns of the images and of the classes."""
        from datasets import ClassLabel, Image

        found = []
        for option, given, kind in (
            ("image_column", self.image_column, Image),
            ("label_column", self.label_column, ClassLabel),
        ):
            features = {n: self._kind(each) if kind is ClassLabel else each for n, each in dataset.features.items()}
            typed = [name for name, feature in features.items() if isinstance(feature, kind)]
            if given is not None and given not in dataset.features:
                hint = did_you_mean(given, dataset.features)
                raise ValueError(
                    f"{self.root} has no column {given!r}; its columns are {listed(map(repr, dataset.features))}{hint}"
                )
            if given is None and len(typed) != 1:
                raise ValueError(
                    f"{self.root} has {len(typed)} columns of the type {kind.__name__}, expected one: name the column as "
                    f"data.{option}, one of {listed(map(repr, dataset.features))}"
                )
            found.append(given or typed[0])
        return found[0], found[1]

    def _kind(self, feature: Any) -> Any:
        """The type of a column of classes, or of the items in its lists; None: it has no lists where there must be some."""
        if not self.several:
            return feature
        return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)

    def _rows(self, dataset: Any, split: str, image: str, label: str, known: list[str] | None) -> list[tuple[Row, Any]]:
        """The images of a split, each with the name of its class, or a list of names where there are several."""
        from datasets import Image

        source = f"the split {split!r} of {self.root}"
        if not len(dataset):
            raise ValueError(f"{source} has no images")
        try:
            rows = dataset.select_columns([image]).with_format(None).cast_column(image, Image(decode=False))
        except Exception as error:  # the library has errors of its own
            raise ValueError(f"{self.root}: the column {image!r} holds no images ({cause(error)})") from error
        found = []
        for index, values in enumerate(dataset.with_format(None)[label]):
            if self.several and not isinstance(values, list):
                raise ValueError(f"{source}, row {index} has {values!r} (column {label!r}): expected a list of classes")
            names = [
                self._name(value, f"{source}, row {index}", label, known)
                for value in (values if self.several else [values])
            ]
            found.append((Row(rows, index, source), names if self.several else names[0]))
        return found

    def _name(self, value: Any, where: str, label: str, known: list[str] | None) -> str:
        """The name of a class."""
        if value is None or value == "" or (known is not None and not 0 <= value < len(known)):
            raise ValueError(f"{where} has the label {value!r} (column {label!r}): expected a class")
        if not isinstance(value, int | str):
            raise ValueError(f"{self.root}: the column {label!r} holds {type(value).__name__}: expected classes")
        return str(value) if known is None else known[int(value)]

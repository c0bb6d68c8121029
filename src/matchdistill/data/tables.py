"""Images and classes by a table: a CSV, TSV or Parquet file with columns of paths, classes and splits."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matchdistill.data.classes import named_classes, several_classes
from matchdistill.data.folder import VAL_NAMES, ImageFiles, same_name
from matchdistill.files import read_text
from matchdistill.messages import cause, did_you_mean, listed, printable

USUAL_SEPARATOR = "|"  # of several labels
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        where: what errors call it: row and file.
        path: of the image.
        label: name of its class.
        split: what the column of splits says; None: there is no such column.
    """

    where: str
    path: str
    label: str
    split: str | None


@dataclass(frozen=True)
class Table:
    """A table of all images, or one of training images and one of validation images.

    Attributes:
        path: the table. Paths of images are relative to its folder.
        val_path: the table of the validation images, if it is another one.
        image_column: the column of the images' paths.
        label_column: the column of the classes' names.
        split_column: the column that says which images are for training; None: "split", if there is one.
        train_split: what it says of training images.
        val_split: what it says of validation images; None: any of `VAL_NAMES`.
        separator: between the names of an image's classes, of which it may have any number; None: it has one.
    """

    path: Path
    val_path: Path | None = None
    image_column: str = "path"
    label_column: str = "label"
    split_column: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    separator: str | None = None

    def read(self) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
        """Training images, validation images (None if the table names none) and class names.

        The order of the rows does not matter: images are ordered by class and path, as in class folders.

        Raises:
            ValueError: in one line, with row and file: a column, a value or a file that is missing, a path that is there
                twice, a split of another name.
        """
        val_names = VAL_NAMES if self.val_split is None else (self.val_split,)
        splits: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []  # training, validation
        seen: dict[str, str] = {}
        looked = _Files()
        for path in [self.path, *([self.val_path] if self.val_path else [])]:
            for row in self._rows(path):
                place = os.path.normpath(path.parent / row.path)
                if place in seen:
                    raise ValueError(f"{row.where} has the path {printable(row.path)!r} of {seen[place]}: remove one")
                if place not in looked:
                    raise ValueError(f"{row.where}: there is no file {printable(place)}")
                if row.split not in (None, self.train_split, *val_names):
                    expected = f"{self.train_split!r} or {' or '.join(map(repr, val_names))}"
                    raise ValueError(f"{row.where} has the split {row.split!r}: expected {expected}")
                seen[place] = row.where
                splits[path != self.path or row.split in val_names].append((place, row.label))
        train, val = (sorted(split) for split in splits)
        given = val if val or self.val_path else None
        if self.separator is None:
            if odd := next((label for _, label in [*train, *val] if USUAL_SEPARATOR in label), None):
                warnings.warn(
                    f"{self.path}: {odd!r} is taken for the name of one class; where an image has several, train the "
                    f"task multilabel, which splits labels at {USUAL_SEPARATOR!r}",
                    stacklevel=2,
                )
            return named_classes(train, given, str(self.path))
        several = [
            [(place, self._names(label, seen[place])) for place, label in split] for split in (train, given or [])
        ]
        return several_classes(several[0], None if given is None else several[1], str(self.path))

    def _names(self, label: str, where: str) -> list[str]:
        """The names of the classes in a label."""
        names = [name.strip() for name in label.split(self.separator)] if label else []
        if "" in names:
            raise ValueError(f"{where} has the label {label!r}: expected names with {self.separator!r} between them")
        return names

    def _rows(self, path: Path) -> Iterator[Row]:
        """The rows of a table, each with a path and a label."""
        suffix = path.suffix.lower()
        if suffix not in (*DELIMITERS, *PARQUET):
            raise ValueError(f"table {path}: expected a file that ends in {', '.join((*DELIMITERS, *PARQUET))}")
        if not path.is_file():
            raise ValueError(f"table {path} {'is no file' if path.exists() else 'does not exist'}")
        needed = {"image_column": self.image_column, "label_column": self.label_column}
        if self.val_path is None and self.split_column is not None:
            needed["split_column"] = self.split_column
        optional = "split" if self.val_path is None and self.split_column is None else None
        read = _delimited if suffix in DELIMITERS else _parquet
        for where, values in read(path, needed, optional):
            for option, column in needed.items():
                if not values[column] and not (self.separator and option == "label_column"):
                    raise ValueError(f"{where}: {option.partition('_')[0]} is empty (column {column!r})")
            yield Row(
                where,
                values[self.image_column],
                same_name(values[self.label_column]),
                values.get(needed.get("split_column", optional)),
            )


Found = Iterator[tuple[str, dict[str | None, str]]]  # of each row where it is, and its values by column


def _delimited(path: Path, needed: dict[str, str], optional: str | None) -> Found:
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"table {path} cannot be read ({cause(error)})") from error
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()], skipinitialspace=True, strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header, needed)
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            where = f"{path}, row {number} (line {reader.line_num})"
            if len(fields) != len(header):
                raise ValueError(f"{where} has {len(fields)} values for {len(header)} columns")
            yield where, {name: field.strip() for name, field in zip(header, fields, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is damaged ({cause(error)})") from error


def _parquet(path: Path, needed: dict[str, str], optional: str | None) -> Found:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"table {path}: Parquet needs pyarrow: pip install 'matchdistill[datasets]'") from error
    try:
        with path.open("rb") as file:
            header = parquet.read_schema(file).names
            _check_columns(path, header, needed)
            columns = [*needed.values(), *([optional] if optional in header else [])]
            rows = parquet.read_table(file, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"table {path} is damaged or no Parquet file ({cause(error)})") from error
    for number, values in enumerate(rows, 1):
        where = f"{path}, row {number}"
        for column, value in values.items():
            if not isinstance(value, str | int | None):
                raise ValueError(f"{where} has a {type(value).__name__} in the column {column!r}: expected text")
        yield where, {name: "" if value is None else str(value).strip() for name, value in values.items()}


def _check_columns(path: Path, header: list[str], needed: dict[str, str]) -> None:
    for option, column in needed.items():
        if column not in header:
            if not header:
                raise ValueError(f"{path} has no column {column!r}; it has no columns at all")
            raise ValueError(
                f"{path} has no column {column!r}; its columns are {listed(map(repr, header))}: name one of them as "
                f"data.{option}{did_you_mean(column, header)}"
            )
        if header.count(column) > 1:
            raise ValueError(f"{path} has the column {column!r} twice")


class _Files:
    """Which files there are: one look into each folder is faster than one at each file, above all on network disks."""

    def __init__(self) -> None:
        self.folders: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.folders:
            try:
                with os.scandir(folder or ".") as entries:
                    self.folders[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self.folders[folder] = set()
        # Some disks find a file by a name in other letters.
        return name in self.folders[folder] or os.path.isfile(path)  # noqa: PTH113 - Path is slow for a million files

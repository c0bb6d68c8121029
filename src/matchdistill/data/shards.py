"""Images and classes in shards as WebDataset writes them: archives of NAME.jpg and NAME.cls, read in any order."""

from __future__ import annotations

import glob
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from matchdistill.data.classes import named_classes
from matchdistill.data.folder import VAL_NAMES, ImageFiles, same_name, some
from matchdistill.data.pictures import IMAGE_SUFFIXES
from matchdistill.files import open_file
from matchdistill.messages import cause, printable

LABEL = ".cls"  # the ending of the files that name a class, by its number or by its name
LONGEST_LABEL = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive that is not compressed, as `Stored` has it.

    Attributes:
        shard: the archive.
        name: of the file.
        start: where its content begins, in bytes.
        size: of its content in bytes.
    """

    shard: str
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"

    def open(self) -> BinaryIO:
        """Its content.

        Raises:
            ValueError: the archive is shorter than it was.
        """
        with open_file(self.shard) as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self.shard} is truncated")
        return io.BytesIO(content)


@dataclass(frozen=True)
class Shards:
    """Archives of training images and of validation images.

    Attributes:
        pattern: a file name with ``*``, ``?`` or ranges like ``{000..099}``, of the training images' shards; or a folder, in
            which the names begin with ``train``, or those of validation images with one of `VAL_NAMES`.
        val_pattern: likewise of the validation images' shards. None: those in the folder, if it has any.
    """

    pattern: Path
    val_pattern: Path | None = None

    def read(self) -> tuple[ImageFiles, ImageFiles | None, list[str]]:
        """Training images, validation images (None if there are no shards of them) and class names.

        Each image is found once, by reading the heads of all files in the shards. Images are ordered by class and name.

        Raises:
            ValueError: in one line, with the shard: it is damaged or compressed, or an image or a class is alone.
        """
        if self.val_pattern is not None:
            train, val = _matching(self.pattern), _matching(self.val_pattern)
        elif self.pattern.is_dir():
            shards = _matching(self.pattern)
            val = [shard for shard in shards if Path(shard).name.startswith(VAL_NAMES)]
            train = [shard for shard in shards if Path(shard).name.startswith("train")]
            if not train:
                raise ValueError(
                    f"{self.pattern} has no shards train*.tar, but {some(Path(shard).name for shard in shards)}: give "
                    "patterns of file names as data.root and data.val_root"
                )
        else:
            train, val = _matching(self.pattern), []
        if both := sorted(set(train) & set(val)):
            raise ValueError(f"{both[0]} is a shard of training and of validation images: give other patterns")
        found = [
            [(member, label) for _, member, label in sorted(_pairs(shards), key=lambda pair: (pair[0], pair[1].shard))]
            for shards in (train, val)
        ]
        return named_classes(found[0], found[1] if val else None, str(self.pattern))


def _matching(pattern: Path) -> list[str]:
    """The archives that a pattern means, in order."""
    if pattern.is_dir():
        found = sorted(str(path) for path in pattern.glob("*.tar"))
        if not found:
            raise ValueError(f"{pattern} has no shards, *.tar")
        return found
    found = []
    for name in _expanded(str(pattern)):
        matching = [name] if Path(name).exists() else sorted(glob.glob(name))  # noqa: PTH207 - of absolute names too
        if not matching:
            raise ValueError(f"there is no shard {name}")
        found += matching
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The names that ranges like ``{000..099}`` stand for.

    Examples:
        >>> list(_expanded("a-{08..11}.tar"))
        ['a-08.tar', 'a-09.tar', 'a-10.tar', 'a-11.tar']
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    if not int(first) <= int(last) < int(first) + 1_000_000:
        raise ValueError(f"{pattern}: expected a range {{first..last}}")
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")


def _pairs(shards: list[str]) -> Iterator[tuple[str, Member, str]]:
    """Of each image its name without ending, where it is, and the name of its class."""
    for shard in shards:
        images: dict[str, Member] = {}
        labels: dict[str, str] = {}
        for key, ending, member in _members(shard):
            known: dict[str, Member] | dict[str, str] = labels if ending == LABEL else images
            if key in known:
                raise ValueError(f"{shard} has two {'classes' if ending == LABEL else 'images'} of {printable(key)}")
            if ending == LABEL:
                labels[key] = _label(member)
            else:
                images[key] = member
        for lone, lacks in ((images.keys() - labels.keys(), "class"), (labels.keys() - images.keys(), "image")):
            if lone:
                raise ValueError(
                    f"{shard} has no {lacks} of {printable(min(lone))}, but NAME{LABEL} and an image NAME.jpg (or "
                    f"another ending) belong together; {len(lone)} are alone"
                )
        yield from ((key, member, labels[key]) for key, member in images.items())


def _members(shard: str) -> Iterator[tuple[str, str, Member]]:
    """The images and classes in a shard: name without ending, ending, place."""
    try:
        with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                folder, slash, name = info.name.rpartition("/")
                stem, dot, ending = name.partition(".")  # as WebDataset: the ending begins at the first dot
                ending = f"{dot}{ending.lower()}"
                if info.isreg() and stem and (ending == LABEL or ending in IMAGE_SUFFIXES):
                    yield f"{folder}{slash}{stem}", ending, Member(shard, info.name, info.offset_data, info.size)
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"shard {shard} cannot be read ({cause(error)}): expected a .tar file that is whole and not compressed"
        ) from error


def _label(member: Member) -> str:
    """The name of a class."""
    if member.size > LONGEST_LABEL:
        raise ValueError(f"{member} has {member.size} bytes: expected the number or name of a class")
    with member.open() as file:
        content = file.read()
    try:
        label = same_name(content.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        label = ""
    if not label or "\n" in label:
        raise ValueError(f"{member} is {content[:20]!r}: expected the number or name of a class")
    return label

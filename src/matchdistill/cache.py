"""What a teacher gives for fixed images, kept on disk: read in place of running the teacher.

Axes: N images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.capture import Captured
from matchdistill.files import write_json
from matchdistill.locking import is_marked, marked
from matchdistill.slots import GIB, Shards, Slots
from matchdistill.trace import tensors_in

FORMAT = 1  # of the files: another number is another cache
DESCRIPTION = "cache.json"


def caches_in(root: Path) -> list[Path]:
    """The folders of caches in a folder that may hold other things too; whole or not."""
    found = (path for path in root.glob("teacher-*") if re.fullmatch("teacher-[0-9a-f]{32}", path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def last_used(folder: Path) -> float:
    """When a cache was opened last."""
    description = folder / DESCRIPTION
    return (description if description.is_file() else folder).stat().st_mtime


def bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    sizes = [0]
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # removed in between
            sizes.append(path.stat().st_size)
    return sum(sizes)


def make_room(root: Path, own: str, needed: int, most: int) -> None:
    """Remove the caches of a folder that were used the longest time ago, until another one fits beside the rest.

    Args:
        root: the folder of all caches.
        own: the name of the one that is to be there.
        needed: the bytes that it has when it is full.
        most: the most bytes of all of them.

    Raises:
        ValueError: it does not fit the bound or the disk, even so.
    """
    check_room(root, needed, most)
    others = {path: bytes_of(path) for path in caches_in(root) if path.name != own}
    for path in sorted(others, key=last_used):
        missing = needed - bytes_of(root / own)
        if sum(others.values()) + needed <= most and missing <= shutil.disk_usage(root).free:
            return
        if is_marked(path):  # looked at last of all: to remove the others takes its time
            continue
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            del others[path]
    if (used := sum(others.values())) + needed > most:
        raise ValueError(
            f"teacher.cache needs {in_gib(needed)}, but other runs that go on now use {in_gib(used)} of the "
            f"{in_gib(most)} in {root}: wait for them, or give a larger --teacher.cache_gib"
        )
    if (missing := needed - bytes_of(root / own)) > (left := shutil.disk_usage(root).free):
        raise _no_room(root, missing, left)


def check_room(root: Path, needed: int, most: int) -> None:
    """Raise a ValueError unless a cache of so many bytes fits the bound, and the disk if all other caches go."""
    if needed > most:
        raise ValueError(
            f"teacher.cache needs {in_gib(needed)}, more than the {in_gib(most)} of teacher.cache_gib: give a larger "
            "--teacher.cache_gib or fewer --teacher.cache_views, or train without (--teacher.cache none)"
        )
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    left = shutil.disk_usage(there).free + sum(map(bytes_of, caches_in(root)))
    if needed > left:
        raise _no_room(root, needed, left)


def _no_room(root: Path, needed: int, left: int) -> ValueError:
    return ValueError(
        f"teacher.cache needs {in_gib(needed)}, but the disk of {root} has {in_gib(left)}: give another "
        "--teacher.cache_folder or fewer --teacher.cache_views, or train without (--teacher.cache none)"
    )


def in_gib(nbytes: float) -> str:
    """Bytes in words.

    Examples:
        >>> in_gib(3 * 2**30), in_gib(2**20)
        ('3.0 GiB', '0.00098 GiB')
    """
    size = nbytes / GIB
    return f"{size:,.1f} GiB" if size >= 1 else f"{size:.2g} GiB"


@dataclass
class TeacherCache:
    """A teacher's values of fixed views, from disk where they are there; see `FrozenTeacher`.

    What was not there is kept, and taken as it will be read: a run does not depend on what was there before it.

    Args:
        root: the folder of all caches.
        layout: of what is kept of a view: the values of the taps in turn, then the output where it is kept.
        teacher: the network.
        told: what the values depend on besides its weights and the pixels, as plain values.
        most: the most bytes of all caches in the folder.
        with_output: whether the teacher's output, a tensor, is kept.

    Attributes:
        numbers: of the views that are run now (N, 2) int64, each with the checksum of its pixels; None: other images are
            run, and the teacher with them.
        runs: how often the teacher has run for views.
    """

    root: Path
    layout: Slots
    teacher: nn.Module
    told: Mapping[str, Any]
    most: int
    with_output: bool = False
    numbers: Tensor | None = field(default=None, init=False)
    runs: int = field(default=0, init=False)
    _shards: Shards | None = field(default=None, init=False)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _told_changes: bool = field(default=False, init=False)

    def __str__(self) -> str:
        return f"the teacher's features take {in_gib(self.layout.nbytes)} in {self.root} (teacher.cache)"

    @property
    def name(self) -> str:
        """The folder's name: a digest of the teacher's weights as they are now, of the layout and of what else is told."""
        digest = hashlib.sha256()
        for key, value in itertools.chain(self.teacher.named_parameters(), self.teacher.named_buffers()):
            content = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(content.flatten().view(torch.uint8).numpy().data)
        told = {"format": FORMAT, "layout": str(self.layout), "output": self.with_output, **self.told}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        return f"teacher-{digest.hexdigest()[:32]}"

    def open(self) -> None:
        """Make room, and take what is there already.

        Raises:
            ValueError: it does not fit.
            OSError: the folder cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / self.name
        make_room(self.root, folder.name, self.layout.nbytes, self.most)
        self._open.enter_context(marked(folder))
        write_json(folder / DESCRIPTION, {"bytes": self.layout.nbytes, "views": self.layout.count, **self.told})
        self._shards = Shards(folder, self.layout)

    def close(self) -> None:
        """Let others remove it."""
        self._shards = self.numbers = None
        self._open.close()

    @contextlib.contextmanager
    def of(self, numbers: Tensor | None) -> Iterator[None]:
        """A block in which the teacher is run on views of these numbers; see `numbers`."""
        self.numbers = numbers
        try:
            yield
        finally:
            self.numbers = None

    def over(self, loader: Any) -> Iterable[Any]:
        """The batches of a loader of `Viewed` ones, whose values are kept while each of them is at hand."""
        return _KnownBatches(self, loader)

    def empty(self, numbers: Sequence[int]) -> list[int]:
        """The views for which nothing is kept."""
        assert self._shards is not None
        return [number for number in numbers if self._shards.is_empty(number)]

    def values(self, captured: Captured, run: Callable[[], dict[int, Any]]) -> dict[int, Any] | None:
        """The teacher's values by number of the tap, and its output in what was captured; None: it is to run as usual.

        Args:
            captured: of the student, with the arguments.
            run: runs the teacher on them and returns its values, whole.
        """
        if self._shards is None or self.numbers is None:
            return None
        images = tensors_in(captured.arguments)[0]
        numbers = self.numbers[: len(images)].tolist()
        kept = [self._shards.read(*each) for each in numbers]
        if None in kept:
            self._tell_changes(numbers, kept)
            self.runs += 1
            found = run()
            given = [found[number].detach().cpu() for number in range(len(found))]
            given += [captured.teacher_output.detach().cpu()] if self.with_output else []
            self._check(given, len(images))
            for place, (number, pixels) in enumerate(numbers):
                if kept[place] is None:
                    kept[place] = self._shards.write(number, pixels, [value[place] for value in given])
        gathered = [
            self._gathered([each[place] for each in kept if each is not None], images)
            for place in range(len(self.layout.shapes))
        ]
        captured.teacher_output = gathered.pop() if self.with_output else None
        return dict(enumerate(gathered))

    def _gathered(self, values: Sequence[Tensor], images: Tensor) -> Tensor:
        """Values of each image (N, *) in float32, where the images are; they are widened there."""
        device = images.device
        wide = device.type == "cpu"
        batch = torch.empty(
            len(values),
            *values[0].shape,
            dtype=torch.float32 if wide else self.layout.dtype,
            pin_memory=device.type == "cuda",
        )
        for row, value in zip(batch, values, strict=True):
            row.copy_(value)
        return batch if wide else batch.to(device, non_blocking=True).float()

    def _check(self, given: Sequence[Tensor], images: int) -> None:
        shapes = tuple(tuple(value.shape) for value in given)
        expected = tuple((images, *shape) for shape in self.layout.shapes)
        if shapes != expected:
            raise ValueError(
                f"the teacher's values have the shapes {shapes}, but the cache is for {expected}: images of several sizes "
                "cannot be cached, train without (--teacher.cache none)"
            )

    def _tell_changes(self, numbers: Sequence[tuple[int, int]], kept: Sequence[Any]) -> None:
        assert self._shards is not None
        lost = [number for (number, _), each in zip(numbers, kept, strict=True) if each is None]
        if not self._told_changes and any(not self._shards.is_empty(number) for number in lost):
            self._told_changes = True
            warnings.warn(
                "some of the teacher's cached values are damaged, or of other pixels than the images have now: the teacher "
                "runs again for these. Where this goes on in every epoch, something varies the images by random numbers "
                "that are not torch's",
                stacklevel=2,
            )


class _KnownBatches:
    """Batches without the numbers of their views, which the cache is told."""

    def __init__(self, cache: TeacherCache, loader: Any) -> None:
        self.cache, self.loader, self.sampler = cache, loader, loader.sampler

    def __iter__(self) -> Iterator[Any]:
        for batch, numbers in self.loader:
            with self.cache.of(numbers):
                yield batch

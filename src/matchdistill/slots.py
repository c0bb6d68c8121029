"""Values of one size each, kept in files that processes share: what is read is what was written, or it is not there."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matchdistill.files import FULL

GIB = 2**30
# The size that a file is to have, and how many there may be: each takes a descriptor.
SHARD, MOST_SHARDS = GIB, 256
LINE = 64  # values start at multiples of so many bytes
EMPTY = 0  # the checksum of a slot that nothing was written into


def checksum(values: Tensor, start: int = 0) -> int:
    """A checksum of 64 bits of a tensor's bytes: any change within eight bytes changes it, and any other one almost surely.

    Examples:
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        False
    """
    content = values.detach().contiguous().flatten().view(torch.uint8).numpy()
    whole = len(content) // 8 * 8
    words = np.frombuffer(content[:whole], np.uint64)
    total = int(np.dot(words, _factors(len(words)))) + start + len(content) * 0xE7037ED1A0B428DB
    if whole < len(content):
        total += int.from_bytes(content[whole:].tobytes() + b"\1", "little") * 0x9E3779B97F4A7C15
    return (total % 2**64 - 2**63) or 1  # as a signed number, and never that of an empty slot


_known: list[Any] = [np.empty(0, np.uint64)]


def _factors(count: int) -> Any:
    """The first odd numbers (count,) of a sequence that is always the same."""
    if len(_known[0]) < count:
        _known[0] = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, count, np.uint64) | np.uint64(1)
    return _known[0][:count]


@dataclass(frozen=True)
class Slots:
    """How the values of one view lie in its slot, after 16 bytes: the slot's checksum, and the one of the view's pixels.

    Attributes:
        shapes: of each value without the axis of images.
        dtype: that they are kept in.
        count: of views.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    count: int

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each value where it starts in the slot, and how many bytes it has."""
        found, start = [], LINE
        for shape in self.shapes:
            size = math.prod(shape) * self.dtype.itemsize
            found.append((start, size))
            start += -(-size // LINE) * LINE
        return found

    @property
    def slot(self) -> int:
        """Bytes of a slot."""
        return LINE + sum(-(-size // LINE) * LINE for _, size in self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slot * self.count

    @property
    def slots(self) -> int:
        """How many slots a shard has, but the last one, which may have fewer."""
        shards = min(MOST_SHARDS, max(1, -(-self.nbytes // SHARD)))
        return -(-self.count // shards)


class Shards:
    """The slots of all views in files of a folder, each of which any process may write.

    A slot is written at once, with a checksum of what it is, whose it is and of which pixels. One that was cut, changed or
    half-written does not fit its checksum and counts as empty.

    Args:
        folder: where; what lies there already is used.
        layout: of the slots.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, layout: Slots) -> None:
        self.folder, self.layout = folder, layout
        self._maps: dict[int, tuple[mmap.mmap, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(-(-layout.count // layout.slots)):
            self._reserve(shard)

    def _size(self, shard: int) -> int:
        return min(self.layout.slots, self.layout.count - shard * self.layout.slots) * self.layout.slot

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:03}.bin"

    def _reserve(self, shard: int) -> None:
        """Make a shard as long as it must be, with empty slots where there were none: a full disk is found out here."""
        path, size = self._path(shard), self._size(shard)
        with _open(path, os.O_RDWR | os.O_CREAT) as file:
            now = os.fstat(file).st_size
            if now > size:
                os.ftruncate(file, size)
            if now < size:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file, 0, size)
                    else:
                        os.ftruncate(file, size)
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    raise OSError(error.errno, os.strerror(error.errno), str(path)) from error

    def _mapped(self, shard: int) -> Tensor:
        """The bytes of a shard as they are on disk at any moment."""
        if self._path(shard).stat().st_size < self._size(shard):  # to read beyond the end would end the process
            self._reserve(shard)
        if shard not in self._maps:
            with _open(self._path(shard), os.O_RDONLY) as file:
                mapped = mmap.mmap(file, self._size(shard), access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                self._maps[shard] = mapped, torch.frombuffer(mapped, dtype=torch.uint8)
        return self._maps[shard][1]

    def _slot(self, number: int) -> Tensor:
        shard, place = divmod(number, self.layout.slots)
        return self._mapped(shard)[place * self.layout.slot :][: self.layout.slot]

    def read(self, number: int, pixels: int) -> list[Tensor] | None:
        """The values of a view, which lie in the file; None: they are not there, are damaged, or are of other pixels."""
        slot = self._slot(number)
        told, of_pixels = slot[:16].view(torch.int64).tolist()
        if told == EMPTY or of_pixels != pixels or told != self._told(slot, number, pixels):
            return None
        return self._values(slot)

    def is_empty(self, number: int) -> bool:
        """Whether nothing was ever written for a view; what was may be damaged."""
        return bool(self._slot(number)[:8].view(torch.int64) == EMPTY)

    def write(self, number: int, pixels: int, values: Sequence[Tensor]) -> list[Tensor]:
        """Keep the values of a view, and return them as they will be read.

        Raises:
            ValueError: values that are finite, but not in the type that they are kept in.
            OSError: the disk is full.
        """
        slot = torch.zeros(self.layout.slot, dtype=torch.uint8)
        for value, kept in zip(values, self._values(slot), strict=True):
            kept.copy_(value)
            if not kept.isfinite().all() and value.isfinite().all():
                raise ValueError(
                    f"the teacher's values, up to {value.abs().amax():.3g}, are too large for "
                    f"{str(self.layout.dtype).removeprefix('torch.')}: give --teacher.cache_dtype bfloat16"
                )
        slot[:16].view(torch.int64).copy_(torch.tensor([self._told(slot, number, pixels), pixels]))
        shard, place = divmod(number, self.layout.slots)
        with _open(self._path(shard), os.O_WRONLY) as file:
            os.lseek(file, place * self.layout.slot, os.SEEK_SET)
            os.write(file, slot.numpy().data)  # if a part only is written, the checksum tells
        return self._values(slot)

    def _told(self, slot: Tensor, number: int, pixels: int) -> int:
        return checksum(slot[LINE:], number * 0xD6E8FEB86659FD93 + pixels * 0xA0761D6478BD642F)

    def _values(self, slot: Tensor) -> list[Tensor]:
        return [
            slot[start : start + size].view(self.layout.dtype).view(shape)
            for (start, size), shape in zip(self.layout.places, self.layout.shapes, strict=True)
        ]


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

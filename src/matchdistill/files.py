"""Files that are either complete or absent: results must survive a crash or a full disk."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, BinaryIO, get_args, get_origin

from matchdistill.messages import cause


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    ``write`` is given a temporary path in the same folder and with the same suffix (writers choose their format by
    it). Whatever fails, the old file stays as it was and the temporary one is removed. Parent folders are created.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "runs", "note.txt")
        >>> atomic_write(path, lambda temporary: temporary.write_text("done"))
        >>> path.read_text()
        'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private (mode 0600) and would stay so after the rename.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(temporary)
        # Without the sync, a power cut after the rename can leave an empty file under the final name.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity, which JSON does not have, become ``null``."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def open_file(path: str | Path) -> BinaryIO:
    """A file to read bytes from; what is no file is refused, as reading a pipe or a device may never end.

    Raises:
        ValueError: it is a folder, a pipe, a device or the like.
        OSError: it cannot be opened.
    """
    # Without waiting for the other end of a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    raise ValueError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a socket')}, not a file")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; raises as `open_file` does."""
    with open_file(path) as file:
        return file.read()


# What a value must be: a type (a float may be whole, no number is a bool), list[...], dict[str, ...], one of several types,
# or a dictionary of the entries that an object must have.
Kind = type | UnionType | GenericAlias | dict[str, Any]


def read_json(path: str | Path, **required: Kind) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        required: the entries that it must have, and their `Kind`.

    Raises:
        ValueError: it is damaged, no object, has a key twice, or lacks an entry.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "metrics.json")
        >>> write_json(path, {"seed": 3})
        >>> read_json(path, seed=int)
        {'seed': 3}
    """
    content = read_bytes(path)
    try:
        value = json.loads(content, object_pairs_hook=_once)  # of bytes it finds out the encoding, by their first ones
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({cause(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if wrong := [key for key, kind in required.items() if key not in value or not is_kind(value[key], kind)]:
        raise ValueError(f"{path} has no {', '.join(wrong)}, or of another type than expected")
    return value


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a kind.

    Examples:
        >>> is_kind({"top1": 1}, dict[str, float]), is_kind([1, "a"], list[int]), is_kind({"a": None}, {"a": int | None})
        (True, False, True)
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(key in value and is_kind(value[key], own) for key, own in kind.items())
    if isinstance(kind, UnionType):
        return any(is_kind(value, own) for own in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_kind(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(is_kind(item, get_args(kind)[1]) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice it is not known which one is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

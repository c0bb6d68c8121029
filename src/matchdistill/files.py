"""Files that are either complete or absent: results must survive a crash or a full disk. And what a path is."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, BinaryIO, get_args, get_origin

from matchdistill.locking import is_locked, try_lock
from matchdistill.messages import cause

PARTIAL = ".partial-"  # in the name of a file that is being written
FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on the disk, or none that the user may fill


def path_of(text: str | Path) -> Path:
    """A path as it is given anywhere: ``~`` at its start is a home, every other character stands for itself.

    Shells leave ``~`` alone in ``--out=~/x``, and files of settings know no shell. Variables (``$HOME``) are the
    shell's.

    Raises:
        ValueError: an empty path, or a home of a user who does not exist.

    Examples:
        >>> import os
        >>> os.environ["HOME"] = "/home/ann"
        >>> str(path_of("~/runs[1]")), str(path_of("$HOME/x"))
        ('/home/ann/runs[1]', '$HOME/x')
    """
    text = str(text)
    if not text.strip():
        raise ValueError("a path is empty: is a variable of the shell not set?")
    path = Path(os.path.expanduser(text))  # noqa: PTH111  (of "./~" pathlib would make a home)
    if text.startswith("~") and not path.is_absolute():
        raise ValueError(f"{text}: there is no home of {path.parts[0]}; write ./{text} for a folder of this name")
    # So that no one expands it a second time.
    return path.absolute() if path.parts and path.parts[0].startswith("~") else path


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
    remove_partial(path.parent, f".{glob.escape(path.stem)}{PARTIAL}*{glob.escape(path.suffix)}")
    # Not tempfile: its files are private (mode 0600) and would stay so after the rename.
    temporary = path.with_name(f".{path.stem}{PARTIAL}{secrets.token_hex(4)}{path.suffix}")
    # The lock says that its writer lives.
    held = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        try_lock(held)
        try:
            write(temporary)
        except RuntimeError:  # what PyTorch's zip writer makes of all errors of a disk
            with temporary.open("ab") as file:
                file.write(b" " * 2**20)  # says so where it is full
                os.fsync(file.fileno())
            raise
        # Without the sync, a power cut after the rename can leave an empty file under the final name.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # a write does not name its file
    finally:
        temporary.unlink(missing_ok=True)
        os.close(held)


def remove_partial(folder: Path, pattern: str = f".*{PARTIAL}*") -> None:
    """Remove what killed writers have left of their files: not what is being written now, by whatever process.

    Args:
        folder: where to look.
        pattern: of the names, with "**/" in front for the folders in it too.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process was faster, or the folder is read-only
            if path.is_file() and is_locked(path) is False:
                path.unlink()


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


def read_text(path: str | Path) -> str:
    """The text of a file that people write, in UTF-8 with or without a byte order mark; raises as `open_file` does.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({cause(error)}): save it as UTF-8") from error


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
        raise ValueError(f"{path} is damaged or not JSON ({cause(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if wrong := [key for key, kind in required.items() if key not in value or not is_kind(value[key], kind)]:
        raise ValueError(f"{path}: {', '.join(wrong)} is missing or has an unexpected type")
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

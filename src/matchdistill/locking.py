"""Who writes: locks that end with the process that holds them, whatever it dies of."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
MARK = ".in-use-"
LONGEST = 30.0  # seconds: processes that a killed one has started take a while to see it, and have locks of their own

_held: set[int] = set()  # descriptors of this process's locks


def _close_in_child() -> None:
    # A fork has them too: the lock would outlive the process that holds it.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other writers, who are told by whom; it is made if it is not there.

    The lock is that of the system on a file in it, which says who holds it. It ends with the process. A folder that was
    made for it and is still empty is removed again.

    Raises:
        ValueError: another process holds it, or this one does already.
        OSError: it cannot be made or written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _locked(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        _let_go(path, descriptor)
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark a folder as in use by this process, beside any others that use it; it is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    path, unlocked = folder / f"{MARK}{name}", folder / f".{name}"
    descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        try_lock(descriptor)
        unlocked.rename(path)  # a mark without a lock would be one that a killed process has left
        yield
    finally:
        _let_go(path, descriptor)


def is_marked(folder: Path) -> bool:
    """Whether a process that lives has marked a folder; where the system does not tell, a mark counts."""
    for path in folder.glob(f"{MARK}*"):
        with contextlib.suppress(FileNotFoundError):
            if is_locked(path) is not False:
                return True
            path.unlink()  # of a process that was killed
    return False


def _let_go(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    _held.discard(descriptor)
    os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of a file that this process alone has locked."""
    begun = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free = try_lock(descriptor)
        if free is None:
            warnings.warn(
                f"{path.parent} cannot be locked on its file system: see that no other run writes there", stacklevel=4
            )
        elif not free:
            owner = _read(path)
            os.close(descriptor)
            if _is_ending(owner) and time.monotonic() - begun < LONGEST:
                time.sleep(0.1)
                continue
            raise ValueError(f"{path.parent} is in use{_told(owner)}: wait until it ends, or choose another --out")
        elif not _is_there(path, descriptor):
            os.close(descriptor)  # its last owner has removed it in between
            continue
        parent = multiprocessing.parent_process()
        owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "parent": None if parent is None else parent.pid,
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    return False


def _read(path: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _is_ending(owner: dict[str, object]) -> bool:
    """Whether the owner, or the process that it works for, was one of this machine and is none any more."""
    if owner.get("host") != socket.gethostname():
        return False
    return any(_is_dead(each) for each in (owner.get("process"), owner.get("parent")) if isinstance(each, int))


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _told(owner: dict[str, object]) -> str:
    if not owner:
        return " by another process"
    return f" by process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"


def is_locked(path: Path) -> bool | None:
    """Whether a process has locked a file; None: the system does not tell."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        free = try_lock(descriptor)
    finally:
        os.close(descriptor)
    return None if free is None else not free


if sys.platform == "win32":

    def try_lock(descriptor: int) -> bool | None:
        """Not on this system."""
        return None

else:
    import fcntl

    def try_lock(descriptor: int) -> bool | None:
        """Lock an open file for this process if no other has; None where the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

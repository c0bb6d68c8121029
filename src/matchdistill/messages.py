"""What is said to the user: pieces of one-line errors, and the console."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


AS_NEAR = 0.1  # below the nearest name's ratio: names further away are not meant


@contextlib.contextmanager
def silent(name: str) -> Iterator[None]:
    """A block in which a logger of another library says nothing."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``; did you mean 'a' or 'b'?``, or nothing if no name is near.

    Examples:
        >>> did_you_mean("resnt18", ["resnet18", "vgg16"])
        "; did you mean 'resnet18'?"
    """
    nearest = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    alike = [difflib.SequenceMatcher(None, name, word).ratio() for name in nearest]
    nearest = [name for name, ratio in zip(nearest, alike, strict=True) if ratio > max(alike) - AS_NEAR]
    return f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


LARGEST = 2**31 - 1  # of whole numbers, which libraries below take as 32 bits


def whole(name: str, value: int | None, least: int, most: int = LARGEST, hint: str = "") -> Iterator[str]:
    """A problem if a whole number is outside of its range; None is inside.

    Examples:
        >>> list(whole("data.workers", -1, 0, 1024))
        ['data.workers is -1: expected a whole number from 0 to 1024']
    """
    if value is not None and not least <= value <= most:
        to = "on" if most == LARGEST and value < least else f"to {most}"
        yield f"{name} is {value}: expected a whole number from {least} {to}{hint}"


def number(name: str, value: float | None, least: float, below: float = math.inf, above: bool = False) -> Iterator[str]:
    """A problem if a number is not finite or outside of its range; None is inside.

    Args:
        name: what it is called.
        value: the number.
        least: the smallest.
        below: what it must be less than.
        above: whether it must be more than ``least``.

    Examples:
        >>> list(number("training.lr", math.nan, 0, above=True))
        ['training.lr is nan: expected a finite number of more than 0']
        >>> list(number("training.ema", 1.0, 0, below=1))
        ['training.ema is 1.0: expected a number from 0 to below 1']
    """
    if value is None or (math.isfinite(value) and least <= value < below and not (above and value == least)):
        return
    if below < math.inf:
        expected = f"a number {'of more than' if above else 'from'} {least} to below {below}"
    else:
        expected = f"a finite number of {'more than' if above else 'at least'} {least}"
    yield f"{name} is {value}: expected {expected}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things.

    Examples:
        >>> counted(1, "image"), counted(0, "image"), counted(2, "process", "processes")
        ('1 image', '0 images', '2 processes')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def cause(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its text.

    Examples:
        >>> cause(RuntimeError("disk full\\nmore details"))
        'RuntimeError: disk full'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_printed: set[str] = set()


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings in a block as sentences, each once; with MATCHDISTILL_DEBUG, with the places that they come from."""
    before = warnings.formatwarning
    _printed.clear()
    if not os.environ.get("MATCHDISTILL_DEBUG"):
        warnings.formatwarning = as_sentence
    try:
        yield
    finally:
        warnings.formatwarning = before


def as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as `plain_warnings` prints it; nothing where it was printed before, by another run of a comparison."""
    text = f"warning: {' '.join(str(message).split())}\n"
    if text in _printed:
        return ""
    _printed.add(text)
    return text


def printable(name: str) -> str:
    """A file's name as any terminal and page can show it: of one that is not UTF-8, the bytes that are not as ``\\xe9``.

    Examples:
        >>> print(printable("caf\\udce9.png"), printable("café.png"))
        caf\\xe9.png café.png
    """
    return re.sub("[\ud800-\udfff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)


def attempt(what: str, work: Callable[[], object]) -> None:
    """Do what the results do not depend on; if it fails, a warning says so."""
    try:
        work()
    except Exception as error:  # whatever it is
        warnings.warn(f"could not {what}: {cause(error)}", stacklevel=2)


def console(quiet: bool = False) -> Console:
    """Standard output; tables are 80 columns wide in files and pipes, or what COLUMNS says; ``soft_wrap`` keeps lines whole.

    Names and paths are printed as they are: brackets and colons in them are no markup.
    """
    from rich.console import Console

    return Console(quiet=quiet, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """A time for people.

    Examples:
        >>> duration(8), duration(100), duration(4000), duration(300_000)
        ('8 s', '2 min', '1.1 h', '3.5 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def listed(names: Iterable[str], most: int = 30) -> str:
    """Names with commas between, the first of them where they are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

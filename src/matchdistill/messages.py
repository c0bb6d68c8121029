"""What is said to the user: pieces of one-line errors, and the console."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``; did you mean 'a' or 'b'?``, or nothing if no name is near.

    Examples:
        >>> did_you_mean("resnt18", ["resnet18", "vgg16"])
        "; did you mean 'resnet18'?"
    """
    nearest = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def cause(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its text.

    Examples:
        >>> cause(RuntimeError("disk full\\nmore details"))
        'RuntimeError: disk full'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def attempt(what: str, work: Callable[[], object]) -> None:
    """Do what the results do not depend on; if it fails, a warning says so."""
    try:
        work()
    except Exception as error:  # whatever it is
        warnings.warn(f"could not {what}: {cause(error)}", stacklevel=2)


def console(quiet: bool = False) -> Console:
    """Standard output; wide where it is no terminal, so that lines in files and pipes stay whole.

    Names and paths are printed as they are: brackets and colons in them are no markup.
    """
    from rich.console import Console

    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)

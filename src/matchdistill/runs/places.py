"""Where a run was made: its recipe's relative paths, and code of the user's own, are looked for there too."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matchdistill.files import read_json, write_json

# Options that name files or folders by where a command runs.
PATHS = {"data": ("root", "val_root"), "teacher": ("weights", "cache_folder"), "student": ("weights",)}
FOLDER = Path("evidence", "folder.json")  # the folder in which the command ran


def keep_folder(out: Path) -> None:
    """Write down in which folder the command runs."""
    write_json(out / FOLDER, {"folder": str(Path.cwd())})


def folder_of(run: Path) -> Path | None:
    """The folder in which a run was made; None where that was not written down."""
    return Path(read_json(run / FOLDER, folder=str)["folder"]) if (run / FOLDER).is_file() else None


def found_again(values: dict[str, Any], run: Path) -> dict[str, Any]:
    """The values of a run's recipe with relative paths as they were meant where the run was made, if they are still there.

    Args:
        values: of the recipe.
        run: its folder.
    """
    made_in = folder_of(run)
    if made_in is None or made_in == Path.cwd():
        return values
    found = dict(values)
    for section, names in PATHS.items():
        own = found.get(section)
        if isinstance(own, dict):
            paths = {key: value for key, value in own.items() if key in names and isinstance(value, str) and value}
            found[section] = {**own, **{key: _found(value, made_in) for key, value in paths.items()}}
    return found


def _found(value: str, made_in: Path) -> str:
    """A path as it was meant where the run was made; another folder may have a file or folder of the same name."""
    return str(made_in / value) if not Path(value).is_absolute() and (made_in / value).exists() else value


@contextlib.contextmanager
def code_of(run: Path) -> Iterator[None]:
    """A block in which modules are looked for where a run was made too; errors say so where that is gone.

    Only for runs that are trusted.
    """
    made_in = folder_of(run)
    if made_in is not None and str(made_in) not in sys.path:
        sys.path.append(str(made_in))  # after all others
    try:
        yield
    except ValueError as error:
        if made_in is None or "there is no library or module" not in str(error):
            raise
        where = "which is not there now" if not made_in.is_dir() else "where it is not now"
        raise ValueError(
            f"{error}. The run was made in {made_in}, {where}: run the command in the folder that has this code"
        ) from error

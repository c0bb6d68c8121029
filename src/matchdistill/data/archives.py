"""Folders of extracted archives that are either complete or absent."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from matchdistill.messages import cause


def extract_once(archive: Path, folder: Path, extract: Callable[[Path], Path]) -> None:
    """Make a folder out of an archive, unless it exists.

    ``extract`` is given an empty folder in the same place and returns what has become ``folder`` in it, which is then
    moved to its name: whatever stops it, there is no folder that looks complete. Of several processes one
    extracts and the others wait.

    Raises:
        ValueError: in one line, why the archive cannot be extracted.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():
                return
            print(f"extracting {archive} into {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                extract(partial).rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{archive} cannot be extracted into {folder} ({cause(error)}): if it is damaged, get the archive again"
        ) from error

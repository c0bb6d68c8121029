"""Files that are either complete or absent: results must survive a crash or a full disk."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    ``write`` is given a temporary path in the same folder and with the same suffix (writers choose their format by
    it). Whatever fails, the old file stays as it was and the temporary one is removed. Parent folders are created.

    Example:
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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

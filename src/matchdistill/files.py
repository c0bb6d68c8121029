"""Files that are either complete or absent: results must survive a crash or a full disk."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

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


def read_json(path: str | Path, **required: type | UnionType) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        required: the types of the entries that it must have.

    Raises:
        ValueError: it is damaged, no object, or lacks an entry.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "metrics.json")
        >>> write_json(path, {"seed": 3})
        >>> read_json(path, seed=int)
        {'seed': 3}
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({cause(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if wrong := [key for key, kind in required.items() if key not in value or not isinstance(value[key], kind)]:
        raise ValueError(f"{path} has no {', '.join(wrong)}, or of another type than expected")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

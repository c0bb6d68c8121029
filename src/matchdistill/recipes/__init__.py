"""The packaged recipes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def packaged() -> dict[str, str]:
    """The packaged recipes: name -> text."""
    files = sorted(resources.files(__name__).iterdir(), key=str)
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")}

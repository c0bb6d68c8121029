"""The command quickstart."""

from __future__ import annotations

from collections.abc import Sequence

from matchdistill.commands.compare import run_comparison


def quickstart(arguments: Sequence[str]) -> None:
    """Distil a digits classifier in several ways and compare them: minutes on two cores."""
    run_comparison(arguments, "matchdistill quickstart", default="quickstart")

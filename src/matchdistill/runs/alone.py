"""The student of a run without its teacher, trained beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from matchdistill.messages import attempt, console
from matchdistill.report.page import write_report
from matchdistill.runs.machine import is_first
from matchdistill.runs.metrics import RunMetrics
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.summary import ALONE, read_alone
from matchdistill.runs.train import fit


def fit_alone(recipe: Recipe, out: Path, quiet: bool = False) -> RunMetrics:
    """Train the student of a finished run without its teacher, in the folder `ALONE` of the run, with the same seed.

    It is trained once: what is finished is returned as it is, and what was cut goes on.

    Args:
        recipe: of the run.
        out: its folder.
        quiet: no progress on the terminal.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    there, first = read_alone(out), is_first(recipe.trainer)
    if there is None:
        console(quiet=quiet or not first).print(f"student alone: {recipe.student.name}, without its teacher")
    alone = fit(Recipe.of(recipe.config, distillation__method="none"), out / ALONE, resume=True, quiet=quiet)
    if there is None and first:
        attempt("write the page", lambda: write_report([out]))
    return alone


def command_for_alone(arguments: Sequence[str], out: Path) -> str:
    """The command that trains the student of a finished run without its teacher."""
    kept, skip = list[str](), False
    for argument in arguments:
        if (
            not skip
            and argument not in ("--resume", "--open", "--baseline", "--out")
            and not argument.startswith("--out=")
        ):
            kept.append(argument)
        skip = argument == "--out"
    return shlex.join(["matchdistill", "fit", *kept, "--out", str(out), "--resume", "--baseline"])

"""The command fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matchdistill.commands.options import add_allow_weak, path_option, point_to_page, print_metrics, resolved_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def fit(arguments: Sequence[str]) -> None:
    """Train a student as a recipe says, with values of your own over it (--training.lr 0.1)."""

    def options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--out", type=path_option, default=None, help="folder of the run; default: runs/ and the recipe's name"
        )
        parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
        parser.add_argument(
            "--baseline", action="store_true", help="train the student without its teacher too, and tell the difference"
        )
        add_allow_weak(parser)
        parser.add_argument("--open", action="store_true", help="open its page in a browser at the end")

    resolved, config, name = resolved_recipe("matchdistill fit", options, arguments)
    if config is None:
        return
    from matchdistill.messages import console
    from matchdistill.report.page import REPORT
    from matchdistill.runs.alone import command_for_alone, fit_alone
    from matchdistill.runs.machine import is_first
    from matchdistill.runs.recipe import Recipe
    from matchdistill.runs.summary import alone_in_words, read_alone
    from matchdistill.runs.train import fit as run
    from matchdistill.tasks import TASKS

    out, recipe = resolved.out or Path("runs") / name, Recipe.of(config)
    if resolved.baseline and not recipe.distillation.needs_teacher:
        raise ValueError("--baseline trains the student without a teacher, as method 'none' does already: leave it out")
    if resolved.baseline:
        Recipe.of(config, distillation__method="none")  # what is wrong with it is told before the training
    metrics = run(recipe, out, resolved.resume)
    if resolved.baseline:
        fit_alone(recipe, out)
    if is_first(recipe.trainer):
        found = {"teacher": metrics.teacher, "student": metrics.student}
        title = f"{metrics.method}, {metrics.epochs} epochs: {out}"
        print_metrics(TASKS[recipe.task].metrics, found, title, metrics.parameters)
        alone, task = read_alone(out), TASKS[recipe.task]
        # Where a student learns from its teacher alone, there is none without it to compare with.
        if recipe.distillation.needs_teacher and metrics.measured and (alone is not None or task.learns_from):
            line = alone_in_words(metrics, alone, command_for_alone(arguments, out))
            console().print(line, highlight=False, soft_wrap=True)
        point_to_page(out / REPORT, resolved.open)

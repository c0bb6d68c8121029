"""The command validate."""

from __future__ import annotations

from collections.abc import Sequence

from matchdistill.commands.help import wants_help
from matchdistill.commands.options import add_trust, print_metrics
from matchdistill.files import path_of


def validate(arguments: Sequence[str]) -> None:
    """Measure a run's student, from its folder, checkpoint or exported file, and its teacher."""
    from matchdistill.runs.machine import is_first
    from matchdistill.runs.metrics import check_schema
    from matchdistill.runs.places import found_again
    from matchdistill.runs.recipe import Recipe, plain_config, read_recipe, recipe_parser, resolve_recipe, task_of
    from matchdistill.runs.store import RECIPE, check_single
    from matchdistill.runs.validate import validate as measure
    from matchdistill.tasks import TASKS

    parser = recipe_parser("matchdistill validate")
    add_trust(parser)
    inside = "a checkpoint or an exported file (.safetensors, .onnx, .pt2) in it"
    parser.usage = f"matchdistill validate RUN [options]   (RUN: a run's folder, or {inside})"
    if not arguments or arguments[0].startswith("-"):
        if wants_help(parser, arguments):
            return
        raise ValueError(f"no run: name the folder of a run, or {inside}, first")

    path = path_of(arguments[0])
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    run, weights = (path.parent, path) if path.is_file() else (path, None)
    if weights is not None and not (run / RECIPE).is_file() and (path.absolute().parents[1] / RECIPE).is_file():
        run = path.absolute().parents[1]  # of an exported file, which has a folder of its own
    if not (run / RECIPE).is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no {RECIPE}")
    check_single(run)
    check_schema(run)
    values = found_again(read_recipe(run / RECIPE), run)
    usage, parser = parser.usage, recipe_parser(parser.prog, task_of(values))
    parser.usage = usage
    add_trust(parser)
    if wants_help(parser, arguments[1:]):
        return
    resolved = resolve_recipe(values, parser, arguments[1:])
    config = plain_config(resolved)
    # The weights that the networks started from may be gone.
    config["student"]["weights"] = None
    if config["teacher"]["training"]["epochs"]:
        config["teacher"]["weights"] = None
    recipe = Recipe.of(config)
    measured = measure(recipe, run, weights, resolved.trust)
    if is_first(recipe.trainer):
        print_metrics(TASKS[recipe.task].metrics, measured, str(path))

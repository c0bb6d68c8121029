"""The command compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matchdistill.commands.options import path_option, point_to_page, resolved_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def compare(arguments: Sequence[str]) -> None:
    """Run a recipe under several methods and seeds: which method helps, and how sure that is."""
    run_comparison(arguments, "matchdistill compare")


def run_comparison(arguments: Sequence[str], prog: str, default: str | None = None) -> None:
    """Run a comparison; without a recipe among the arguments, that of the default."""

    def options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--out", type=path_option, default=None, help="folder; default: runs/ and the recipe's name"
        )
        parser.add_argument(
            "--methods", type=str, default=None, help="with commas: none,kd,mgd-amp+kd; default: the recipe's"
        )
        parser.add_argument("--seeds", type=int, default=None, help="runs per method; default: the recipe's")
        parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
        parser.add_argument("--open", action="store_true", help="open the page in a browser at the end")
        if default is not None:
            parser.set_defaults(jobs=max(1, min(8, os.cpu_count() or 1)))

    resolved, config, name = resolved_recipe(prog, options, arguments, default, _grid)
    if config is None:
        return
    from matchdistill.messages import console, whole
    from matchdistill.report.page import REPORT
    from matchdistill.runs.compare import compare as run
    from matchdistill.runs.machine import is_first
    from matchdistill.runs.recipe import LARGEST_SEED, Recipe

    if resolved.jobs < 1:
        raise ValueError(f"--jobs {resolved.jobs}: expected at least 1")
    recipe = Recipe.of(config)
    if problems := list(whole("the last of the seeds", recipe.seed + recipe.compare.seeds - 1, 0, LARGEST_SEED)):
        raise ValueError(problems[0])
    out = resolved.out or Path("runs") / name
    first = is_first(recipe.trainer)
    terminal = console(quiet=not first)
    run(recipe, out, recipe.compare.methods, recipe.compare.seeds, resolved.jobs, terminal)
    if first:
        print(f"results: {out}/metrics.json, {out}/metrics.csv; students: {out}/cells/METHOD/SEED/student.safetensors")
        point_to_page(out / REPORT, resolved.open)


def _grid(resolved: Namespace, config: dict[str, Any]) -> None:
    """Put the short options --methods and --seeds into the recipe."""
    if resolved.methods is not None:
        config["compare"]["methods"] = [method.strip() for method in resolved.methods.split(",")]
    if resolved.seeds is not None:
        config["compare"]["seeds"] = resolved.seeds

"""The command compare."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matchdistill.commands.options import add_allow_weak, path_option, plain_parser, point_to_page, resolved_recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from matchdistill.runs.recipe import Recipe

COLLECT = "--collect"


def compare(arguments: Sequence[str]) -> None:
    """Run a recipe under several methods and seeds: which method helps, and how sure that is."""
    if any(argument.partition("=")[0] == COLLECT for argument in arguments):
        _collect(arguments)
        return
    # The section of the cluster's options has the name of the option that chooses it.
    named = [re.sub(r"^--cluster(=|$)", r"--cluster.name\1", argument) for argument in arguments]
    run_comparison(named, "matchdistill compare")


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
        add_allow_weak(parser)
        if default is None:
            from matchdistill.runs.cluster import Cluster

            parser.add_class_arguments(Cluster, "cluster")
            parser.add_argument("--array", type=int, default=None, help="with --cluster: jobs at a time; default: all")
            parser.add_argument(
                COLLECT, type=path_option, default=None, help="DIR, and no recipe: the table of a comparison by jobs"
            )
        else:
            parser.set_defaults(jobs=max(1, min(8, os.cpu_count() or 1)))

    resolved, config, name = resolved_recipe(prog, options, arguments, default, _grid)
    if config is None:
        return
    from matchdistill.messages import console, whole
    from matchdistill.runs.compare import compare as run
    from matchdistill.runs.machine import is_first
    from matchdistill.runs.recipe import LARGEST_SEED, Recipe

    if resolved.jobs < 1:
        raise ValueError(f"--jobs {resolved.jobs}: expected at least 1")
    recipe = Recipe.of(config)
    if problems := list(whole("the last of the seeds", recipe.seed + recipe.compare.seeds - 1, 0, LARGEST_SEED)):
        raise ValueError(problems[0])
    out = resolved.out or Path("runs") / name
    if default is None and _submit(recipe, out, resolved):
        return
    first = is_first(recipe.trainer)
    terminal = console(quiet=not first)
    run(recipe, out, recipe.compare.methods, recipe.compare.seeds, resolved.jobs, terminal)
    if first:
        _point_to(out, resolved.open)


def _submit(recipe: Recipe, out: Path, resolved: Namespace) -> bool:
    """Have the runs done by jobs, if the options say so."""
    from matchdistill.messages import whole
    from matchdistill.runs.cluster import JOBS, Cluster, submit

    cluster = Cluster(**resolved.cluster.as_dict())
    problems = [*cluster.problems("cluster"), *whole("--array", resolved.array, 1)]
    if cluster.name is None and resolved.array is not None:
        problems.append("--array needs --cluster slurm or --cluster local")
    if cluster.name is not None and resolved.jobs != 1:
        problems.append("--jobs is for processes of this command: give --array with --cluster")
    if cluster.name is not None and resolved.open:
        problems.append(f"--open has no page to show before the jobs end: give it with {COLLECT} {out} then")
    if problems:
        raise ValueError("; ".join(problems))
    if cluster.name is None:
        return False
    submitted = submit(recipe, out, recipe.compare.methods, recipe.compare.seeds, cluster, resolved.array)
    if not submitted:
        _show(out, opens=False)
        return True
    for each in submitted:
        print(f"job {each.job}: {', '.join(each.runs)}")
    print(
        f"logs: {out / JOBS}; the last job writes the table and the page, matchdistill compare {COLLECT} {out} says what "
        "is missing before"
    )
    return True


def _collect(arguments: Sequence[str]) -> None:
    parser = plain_parser("matchdistill compare", compare)
    parser.add_argument(COLLECT, type=path_option, required=True, help="folder of a comparison whose runs were jobs")
    parser.add_argument("--open", action="store_true", help="open the page in a browser at the end")
    options = parser.parse_args(list(arguments))
    _show(options.collect, options.open)


def _show(out: Path, opens: bool) -> None:
    """The table and the page of runs that were jobs."""
    from matchdistill.messages import console
    from matchdistill.runs.cluster import collect
    from matchdistill.runs.compare import show_summary

    show_summary(collect(out), console())
    _point_to(out, opens)


def _point_to(out: Path, opens: bool) -> None:
    from matchdistill.report.page import REPORT

    print(f"results: {out}/metrics.json, {out}/metrics.csv; students: {out}/cells/METHOD/seedN/student.safetensors")
    point_to_page(out / REPORT, opens)


def _grid(resolved: Namespace, config: dict[str, Any]) -> None:
    """Put the short options --methods and --seeds into the recipe."""
    if resolved.methods is not None:
        config["compare"]["methods"] = [method.strip() for method in resolved.methods.split(",")]
    if resolved.seeds is not None:
        config["compare"]["seeds"] = resolved.seeds

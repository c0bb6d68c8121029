"""What the commands have in common: options, the recipe, and what they print."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matchdistill.commands.help import HELP, wants_help
from matchdistill.files import path_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from matchdistill.tasks.metric import Metric


MOST_COLUMNS = 5  # of a table of networks that fits a terminal


def path_option(text: str) -> Path:
    """As `path_of`, for the options of a parser, which keeps the words of this error alone."""
    try:
        return path_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def plain_parser(prog: str, command: Callable[[Sequence[str]], None]) -> ArgumentParser:
    """The options of a command that takes no recipe."""
    from matchdistill.values import OPTIONS, OptionParser

    return OptionParser(prog=prog, exit_on_error=False, description=command.__doc__, parser_mode=OPTIONS)


def add_trust(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="run code that the folder names, or that is in a .pt2 file: only your own"
    )


def add_allow_weak(parser: ArgumentParser) -> None:
    """The short form of an option of recipes."""
    parser.add_argument(
        "--allow-weak-teacher", action="store_true", help="train even if the teacher knows nothing of the classes"
    )


def resolved_recipe(
    prog: str,
    options: Callable[[ArgumentParser], None],
    arguments: Sequence[str],
    default: str | None = None,
    adjust: Callable[[Namespace, dict[str, Any]], None] | None = None,
) -> tuple[Namespace, dict[str, Any] | None, str]:
    """The options, the recipe's configuration (None if it was only to be printed) and the recipe's name.

    The recipe is the first argument, or that of --config; its values go below those of the command line.

    Args:
        prog: the command.
        options: adds the options that it has beside those of a recipe.
        arguments: of the command.
        default: the recipe where none is named.
        adjust: puts options into the configuration.
    """
    from matchdistill.runs.recipe import Recipe, plain_config, read_recipe, recipe_parser, resolve_recipe, task_of

    # --config and --print_config are taken out here: jsonargparse's own actions of these names would let the recipe win,
    # or print it without the values that are given after it.
    rest = [part for argument in arguments for part in _split_config(argument)]
    only_print = "--print_config" in rest
    rest = [argument for argument in rest if argument != "--print_config"]
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    if "--config" in rest[:-1]:
        at = rest.index("--config")
        name = rest[at + 1]
        del rest[at : at + 2]
    if name is None and not set(HELP) & set(rest):
        raise ValueError("no recipe: name a YAML file or a packaged recipe first (see matchdistill recipes list)")
    values = {} if name is None else read_recipe(name)
    parser = recipe_parser(prog, task_of(values, rest))
    parser.usage = f"{prog} {'[RECIPE]' if default else 'RECIPE'} [options]   (RECIPE: a file or a packaged name)"
    options(parser)
    parser.add_argument("--config", type=str, default=None, help="the recipe, instead of naming it first")
    parser.add_argument("--print_config", action="store_true", help="print the whole resolved recipe and stop")
    if wants_help(parser, rest):
        return parser.get_defaults(), None, ""
    resolved = resolve_recipe(values, parser, rest)
    config = plain_config(resolved)
    if getattr(resolved, "allow_weak_teacher", False):
        config["teacher"]["allow_weak"] = True
    if adjust is not None:
        adjust(resolved, config)
    if only_print:
        import yaml

        Recipe.of(config)  # what would be refused is
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return resolved, None, ""
    return resolved, config, Path(name or "").stem


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def print_metrics(
    metrics: Sequence[Metric],
    found: Mapping[str, Mapping[str, float]],
    title: str,
    parameters: Mapping[str, int | None] | None = None,
) -> None:
    """A table of what teacher and student come to.

    Args:
        metrics: of the task.
        found: the metrics of "teacher" and "student" by name, empty for none.
        title: of the table.
        parameters: how many both have; None leaves the column out.
    """
    from rich.table import Table

    from matchdistill.messages import console
    from matchdistill.tasks.metric import metrics_in

    shown = metrics_in(metrics, found["student"])
    rows = [["network", *(metric.label for metric in shown), *(["parameters"] if parameters else [])]]
    for role in ("teacher", "student"):
        if found[role] or (role == "student" and not shown):
            row = [metric.shown(found[role][metric.name]) if metric.name in found[role] else "" for metric in shown]
            rows.append([role, *row, *([f"{parameters[role]:,}"] if parameters else [])])
    if len(rows[0]) > MOST_COLUMNS:  # a column for each network then
        rows = list(map(list, zip(*rows, strict=True)))
    table = Table(rows[0][0])
    for heading in rows[0][1:]:
        table.add_column(heading, justify="right")
    for row in rows[1:]:
        table.add_row(*row)
    terminal = console()
    terminal.print(title, highlight=False, soft_wrap=True)  # a table would break a path in it
    terminal.print(table)


def point_to_page(path: Path, opens: bool) -> None:
    """Say where a page is, and open it."""
    if not path.is_file():
        return  # a warning has said why
    print(f"page: {path}")
    if opens:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())

"""The page of the command line: each command with its own options, and the options of a recipe on their own page, once."""

from __future__ import annotations

import contextlib
import io
import os
from argparse import SUPPRESS, Action
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser

from matchdistill import cli
from matchdistill.commands.help import USED
from matchdistill.runs.recipe import SECTIONS

RECIPE_OPTIONS = (
    "It takes every option of a recipe too: [the usual ones](#ten-options-to-start-with), [all of them](options.md)."
)
OF_ALL = ("help", "config", "print_config")  # options of every command with a recipe
ELSEWHERE = {"cluster": "`--cluster.` options: [on a cluster](../howto/cluster.md), and `--help all`."}


def all_commands() -> str:
    """What `matchdistill` prints, and under a heading for each command what it does and its own options."""
    parts = [f"```text\n{printed([])[0]}\n```"]
    for name, command in cli.COMMANDS.items():
        text, parser = printed([name, "--help", "all"])
        parts.append(f"## {name}\n\n{(command.__doc__ or '').split(chr(10))[0]}")
        parts.append(f"```text\n{text}\n```" if parser is None else described(name, parser))
    return "\n\n".join(parts)


def printed(arguments: list[str]) -> tuple[str, ArgumentParser | None]:
    """What a command prints, and the parser that has printed it, if one has."""
    found: list[ArgumentParser] = []

    def print_help(parser: ArgumentParser, *_: Any) -> None:
        found.append(parser)

    shown = io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        patch.dict(os.environ, COLUMNS="80"),
        patch.object(ArgumentParser, "print_help", print_help),
        contextlib.suppress(SystemExit),
    ):
        cli.main(arguments or ["--help"])
    return shown.getvalue().strip(), found[0] if found else None


def described(name: str, parser: ArgumentParser) -> str:
    """A command's usage, and its own options in a table."""
    actions = own_options(parser)
    places = [action for action in actions if not action.option_strings]
    usage = " ".join(["matchdistill", name, *(place_of(action) for action in places), "[options]"])
    if takes_recipe(parser):
        usage = str(parser.usage).partition("   ")[0]
    rows = [row(action) for action in actions]
    parts = [f"`{usage}`", "\n".join(["| option | what it does | default |", "|---|---|---|", *rows])]
    if takes_recipe(parser):
        parts.append(RECIPE_OPTIONS)
    sections = {action.dest.partition(".")[0] for action in parser._actions if "." in action.dest}
    parts += [text for section, text in ELSEWHERE.items() if section in sections]
    return "\n\n".join(parts)


def own_options(parser: ArgumentParser) -> list[Action]:
    """The options that no recipe has."""
    not_own = {*SECTIONS, *USED, *OF_ALL} if takes_recipe(parser) else {"help"}
    return [each for each in parser._actions if each.dest.partition(".")[0] not in not_own and each.help != SUPPRESS]


def takes_recipe(parser: ArgumentParser) -> bool:
    """Whether the options of a recipe are among a command's."""
    return any(action.dest == "training.epochs" for action in parser._actions)


def place_of(action: Action) -> str:
    """How the usage shows an argument without a name."""
    shown = action.dest.upper()
    return f"{shown} ..." if action.nargs in ("+", "*") else f"[{shown}]" if action.nargs == "?" else shown


def row(action: Action) -> str:
    """An option in a table."""
    name = f"--{action.dest}" if action.option_strings else place_of(action)
    text = " ".join((action.help or "").replace("``", "`").replace("|", "\\|").replace("%%", "%").split())
    given = action.default if isinstance(action.default, str | int | float) and action.default is not False else ""
    default = f"`{given}`" if action.option_strings and str(given) not in ("", SUPPRESS) else ""
    return f"| `{name}` | {text} | {default} |"

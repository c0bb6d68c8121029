"""The short help of the commands that take a recipe: of each section the options that most people set."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Action

    from jsonargparse import ArgumentParser

WIDTH, NAMES = 79, 27  # of a line, and of an option's name in it
HELP = ("-h", "--help")
# Those of a section that a task does not have are left out.
USED = {
    "data": ("name", "root", "image_size", "masks", "batch_size", "workers"),
    "teacher": ("name", "weights", "training.epochs"),
    "student": ("name", "weights"),
    "training": ("epochs", "optimizer", "lr", "schedule", "validate_every"),
    "distillation": ("method", "taps", "weights"),
    "trainer": ("accelerator", "devices", "precision"),
    "cluster": ("name", "partition"),
}


def wants_help(parser: ArgumentParser, arguments: Sequence[str]) -> bool:
    """Print the help that the arguments ask for, ``--help`` or ``--help all``; whether they ask for any."""
    at = next((at for at, argument in enumerate(arguments) if argument in HELP), None)
    if at is None:
        return False
    if list(arguments[at + 1 : at + 2]) == ["all"]:
        parser.print_help()
    else:
        print(short_help(parser))
    return True


def short_help(parser: ArgumentParser) -> str:
    """The options of a recipe's parser in fewer than two screens."""
    from matchdistill.runs.recipe import SECTIONS

    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    own = [action for name, action in actions.items() if name.partition(".")[0] not in {*SECTIONS, *USED}]
    lines = [
        *textwrap.wrap(f"usage: {parser.usage}", WIDTH, subsequent_indent="  "),
        "",
        *map(_line, own),
        _line(actions["task"]),
        _line(actions["seed"]),
    ]
    for section, names in USED.items():
        shown = [actions[f"{section}.{name}"] for name in names if f"{section}.{name}" in actions]
        count = sum(name.startswith(f"{section}.") for name in actions)
        if not count:  # not of this command
            continue
        lines += [f"{section}: {len(shown)} of {count} options", *map(_line, shown)]
    return "\n".join([*lines, "", "--help all explains every option in full."])


def _line(action: Action) -> str:
    """An option and how its explanation begins."""
    text = textwrap.shorten((action.help or "").replace("``", ""), WIDTH - NAMES - 4, placeholder=" …")
    return f"  {action.option_strings[0]:{NAMES}}  {text}".rstrip()

"""The command `matchdistill`."""

from __future__ import annotations

import codecs
import io
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence

from matchdistill.commands.compare import compare
from matchdistill.commands.completion import print_completion
from matchdistill.commands.export import export
from matchdistill.commands.fit import fit
from matchdistill.commands.init import init
from matchdistill.commands.predict import predict
from matchdistill.commands.quickstart import quickstart
from matchdistill.commands.recipes import recipes
from matchdistill.commands.report import report
from matchdistill.commands.taps import taps
from matchdistill.commands.validate import validate

SIGNS = {"±": "+-", "…": "...", "×": "x", "→": "->", "–": "-", "—": "-", "’": "'"}  # noqa: RUF001
LONGEST_ERROR = 1_000  # characters: a list of mistakes is whole, the output of a compiler is not


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for a mistake of the user, said in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _make_streams_usable()
    if arguments[:1] == ["help"]:  # help COMMAND is COMMAND --help
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "version"):
        from importlib.metadata import version

        print(version("matchdistill"))
        return 0
    from jsonargparse import ArgumentError

    from matchdistill.ending import OUT_OF_TIME, OutOfTime, Terminated, orderly
    from matchdistill.messages import did_you_mean, plain_warnings

    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            names = [*COMMANDS, "help", "version"]
            raise ValueError(
                f"unknown command {arguments[0]!r}{did_you_mean(arguments[0], names) or '.'} Commands: {', '.join(names)}"
            )
        for before, argument in itertools.pairwise(arguments):
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                option = argument.removesuffix("=") or before
                raise ValueError(f"{option} is given an empty value: is a variable of the shell not set?")
        with orderly(), plain_warnings():
            command(arguments[1:])
    except (ValueError, OSError, FloatingPointError, ArgumentError, RuntimeError) as error:
        if os.environ.get("MATCHDISTILL_DEBUG"):
            raise
        text = " ".join(str(error).split())
        if len(text) > LONGEST_ERROR:
            text = f"{text[:LONGEST_ERROR]}… (MATCHDISTILL_DEBUG=1 shows the rest)"
        print(f"matchdistill: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except Terminated:
        return _ended("terminated by SIGTERM", 143)
    except OutOfTime as limit:
        return _ended(str(limit), OUT_OF_TIME)
    return 0


def _make_streams_usable() -> None:
    """See that there are streams to write to, and that they take every character; some have not, or are ASCII alone."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # of a stream that is closed, which no other file may take
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    codecs.register_error("matchdistill", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="matchdistill")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a stream does not have: signs that are alike, or their number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text), error.end


def _ended(how: str, code: int) -> int:
    """Say that a command has been ended, once where several processes run it."""
    lightning = sys.modules.get("pytorch_lightning.utilities")
    if lightning is None or lightning.rank_zero_only.rank == 0:
        print(f"matchdistill: {how}; finished work is kept: continue a run with --resume", file=sys.stderr)
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    indent = " " * (width + 4)
    lines = [
        textwrap.fill(f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}", 79, subsequent_indent=indent)
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: matchdistill COMMAND ...",
            "",
            "Matching Guided Distillation: a big vision network trains a small one.",
            "",
            *lines,
            "",
            "matchdistill COMMAND --help explains each, and --help all every option.",
            "matchdistill version is the version.",
            "MATCHDISTILL_DEBUG=1 shows where an error comes from.",
        ]
    )


def completion(arguments: Sequence[str]) -> None:
    """Print what makes a shell complete commands, options and recipes: bash | zsh."""
    print_completion(arguments, COMMANDS)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (quickstart, init, fit, compare, report, validate, predict, taps, recipes, export, completion)
}

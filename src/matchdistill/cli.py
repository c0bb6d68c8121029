"""The command `matchdistill`."""

from __future__ import annotations

import codecs
import io
import itertools
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matchdistill.files import path_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import Tensor

# The modules of the commands are imported by them: `matchdistill --help` need not wait for PyTorch.

SIGNS = {"±": "+-", "…": "...", "×": "x", "→": "->", "–": "-", "—": "-", "’": "'"}  # noqa: RUF001
LONGEST_ERROR = 1_000  # characters: a list of mistakes is whole, the output of a compiler is not


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for a mistake of the user, said in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _make_streams_usable()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("matchdistill"))
        return 0
    from jsonargparse import ArgumentError

    from matchdistill.ending import Terminated, orderly

    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            from matchdistill.messages import did_you_mean

            raise ValueError(
                f"unknown command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}: expected one of "
                + ", ".join(COMMANDS)
            )
        for before, argument in itertools.pairwise(arguments):
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                option = argument.removesuffix("=") or before
                raise ValueError(f"{option} is given an empty value: is a variable of the shell not set?")
        with orderly():
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
        print(f"matchdistill: {how}; what was finished is kept, a run goes on with it by --resume", file=sys.stderr)
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: matchdistill COMMAND ...",
            "",
            "Matching Guided Distillation: a big vision network trains a small one.",
            "",
            *lines,
            "",
            "matchdistill COMMAND --help explains each. MATCHDISTILL_DEBUG=1 shows where an error comes from.",
        ]
    )


def _path(text: str) -> Path:
    """As `path_of`, for the options of a parser, which keeps the words of this error alone."""
    try:
        return path_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def quickstart(arguments: Sequence[str]) -> None:
    """Distil a digits classifier in five ways and compare them: minutes on two cores."""
    _compare(arguments, "matchdistill quickstart", default="quickstart")


def compare(arguments: Sequence[str]) -> None:
    """Run a recipe under several methods and seeds: which method helps, and how sure that is."""
    _compare(arguments, "matchdistill compare")


def fit(arguments: Sequence[str]) -> None:
    """Train a student as a recipe says, with values of your own over it (--training.lr 0.1)."""

    def options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--out", type=_path, default=None, help="folder of the run; default: runs/ and the recipe's name"
        )
        parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
        parser.add_argument("--open", action="store_true", help="open its page in a browser at the end")

    resolved, config, name = _resolved("matchdistill fit", options, arguments)
    if config is None:
        return
    from matchdistill.report.page import REPORT
    from matchdistill.runs.recipe import Recipe
    from matchdistill.runs.train import fit as run
    from matchdistill.runs.train import is_first

    out, recipe = resolved.out or Path("runs") / name, Recipe.of(config)
    metrics = run(recipe, out, resolved.resume)
    if is_first(recipe.trainer):
        _print_metrics(metrics, f"{metrics['method']}, {metrics['epochs']} epochs: {out}", metrics["parameters"])
        _point_to_page(out / REPORT, resolved.open)


def report(arguments: Sequence[str]) -> None:
    """Write the page of a run or a comparison, finished or not, or of several runs side by side."""
    parser = _parser("matchdistill report", report)
    parser.add_argument("runs", type=_path, nargs="+", help="folders of runs, or of one comparison")
    parser.add_argument(
        "--out", type=_path, default=None, help="the file; default: report.html in the folder, or here for several"
    )
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    options = parser.parse_args(list(arguments))
    from matchdistill.report.page import write_report

    _point_to_page(write_report(options.runs, options.out), options.open)


def validate(arguments: Sequence[str]) -> None:
    """Measure a run's student, from its folder, checkpoint or exported file, and its teacher."""
    from matchdistill.runs.recipe import recipe_parser

    parser = recipe_parser("matchdistill validate")
    inside = "a checkpoint or an exported file (.safetensors, .onnx, .pt2) in it"
    parser.usage = f"matchdistill validate RUN [options]   (RUN: a run's folder, or {inside})"
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(["--help"] if {"-h", "--help"} & set(arguments) else [])
        raise ValueError(f"no run: name the folder of a run, or {inside}, first")
    from matchdistill.runs.recipe import Recipe, plain_config, read_recipe, resolve_recipe, task_of
    from matchdistill.runs.store import CELLS, RECIPE
    from matchdistill.runs.train import is_first
    from matchdistill.runs.validate import validate as measure

    path = path_of(arguments[0])
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    run, weights = (path.parent, path) if path.is_file() else (path, None)
    if weights is not None and not (run / RECIPE).is_file() and (path.absolute().parents[1] / RECIPE).is_file():
        run = path.absolute().parents[1]  # of an exported file, which has a folder of its own
    if not (run / RECIPE).is_file():
        raise ValueError(f"{run} is no folder of a run: it has no {RECIPE}")
    if (run / CELLS).is_dir():
        raise ValueError(f"{run} is the folder of a comparison: name one of its runs, {run / CELLS}/METHOD/seedN")
    values = read_recipe(run / RECIPE)
    parser = recipe_parser(parser.prog, task_of(values))
    _add_trust(parser)
    resolved = resolve_recipe(values, parser, arguments[1:])
    config = plain_config(resolved)
    # Those that it started from need not be here any more.
    config["student"]["weights"] = None
    if config["teacher"]["training"]["epochs"]:
        config["teacher"]["weights"] = None
    recipe = Recipe.of(config)
    measured = measure(recipe, run, weights, resolved.trust)
    if is_first(recipe.trainer):
        _print_metrics(measured, str(path))


def _add_trust(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="run code that the folder names, or that is in a .pt2 file: only your own"
    )


def taps(arguments: Sequence[str]) -> None:
    """Show which features of two models would be matched, and why."""
    parser = _parser("matchdistill taps", taps)
    parser.add_argument("teacher", type=str, help="torchvision:NAME, timm:NAME or package.module:function")
    parser.add_argument("student", type=str, help="likewise")
    parser.add_argument("--image_size", type=int, default=None, help="pixels; default: what the models ask for")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument(
        "--example",
        type=str,
        nargs="+",
        default=None,
        help="inputs of other kinds, each by its shape without the batch: 3x16x112x112 a video, 1x16000 a sequence, 12:int "
        "whole numbers; several for networks of several inputs",
    )
    parser.add_argument("--reduction", type=str, default="amp", help="sm, rd, amp, max or mean")
    parser.add_argument("--task", type=Literal["classification", "detection"], default="classification")
    parser.add_argument("--teacher_options", type=dict[str, Any], default={}, help="of the function that builds it")
    parser.add_argument("--student_options", type=dict[str, Any], default={}, help="likewise")
    options = parser.parse_args(list(arguments))
    import torch
    from rich.table import Table
    from rich.text import Text

    from matchdistill.distiller import MatchingDistiller
    from matchdistill.messages import console
    from matchdistill.models import build_detector, build_model
    from matchdistill.models.detector_parts import distilled_part

    example: Any = None
    if options.example is not None:
        if options.image_size is not None:
            raise ValueError("--example and --image_size are both given: give one of them")
        example = tuple(map(_input, options.example))
    elif options.image_size is not None:
        if min(options.image_size, options.channels) < 1:
            raise ValueError(
                f"--image_size {options.image_size} --channels {options.channels}: expected at least 1 each"
            )
        example = torch.zeros(2, options.channels, options.image_size, options.image_size)
    networks = (options.teacher, options.teacher_options), (options.student, options.student_options)
    if options.task == "detection":
        teacher, student = (distilled_part(build_detector(name, 80, **own), pyramid=False) for name, own in networks)
    else:
        teacher, student = (build_model(name, **own) for name, own in networks)
    distiller = MatchingDistiller(teacher, student, reduction=options.reduction, example=example)
    table = Table(title=f"{options.teacher} -> {options.student}", show_lines=True)
    for heading in ("teacher tap", "student tap", "channels", "map", "G", "margins", "body"):
        table.add_column(heading, overflow="fold")
    for position in distiller.positions:
        table.add_row(
            *(Text.assemble(str(tap), "\n", (str(tap.reason), "dim")) for tap in (position.teacher, position.student)),
            f"{position.teacher_channels} -> {position.student_channels}",
            " -> ".join(dict.fromkeys("x".join(map(str, size)) for size in position.spatial)),
            str(position.index.shape[1]),
            position.margin_norm or "measured",
            f"{position.guided_share:.0%}",
        )
    table.caption = (
        f"body: share of the student's weights that lead to the position; to any: {distiller.guided_share:.0%}"
    )
    console().print(table)


def _input(text: str) -> Tensor:
    """A batch of two zeros from a shape, "3x224x224", or "12:int"."""
    import torch

    shape, _, kind = text.partition(":")
    sizes = shape.split("x") if shape else []
    if kind not in ("", "int") or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--example {text}: expected a shape without the batch, such as 3x224x224, or 12:int")
    return torch.zeros(2, *map(int, sizes), dtype=torch.int64 if kind else torch.float32)


def recipes(arguments: Sequence[str]) -> None:
    """List, show or copy the packaged recipes: list | show NAME | copy NAME [FILE]."""
    from matchdistill.messages import did_you_mean
    from matchdistill.runs.recipe import packaged

    known = packaged()
    usage = "usage: matchdistill recipes list | show NAME | copy NAME [FILE]"
    match list(arguments):
        case ["-h" | "--help"]:
            print(usage)
        case ["list"]:
            width = max(map(len, known))
            for name, text in known.items():
                print(f"{name:{width}}  {text.splitlines()[0].lstrip('# ')}")
        case ["show" | "copy", name, *_] if name not in known:
            raise ValueError(f"no recipe {name!r}{did_you_mean(name, known)}: expected one of {', '.join(known)}")
        case ["show", name]:
            print(known[name], end="")
        case ["copy", name, *rest] if len(rest) < 2:
            from matchdistill.files import atomic_write

            path = path_of(rest[0] if rest else f"{name}.yaml")
            if path.exists():
                raise ValueError(f"{path} exists already: name another file")
            atomic_write(path, lambda temporary: temporary.write_text(known[name], encoding="utf-8"))
            print(path)
        case _:
            raise ValueError(usage)


def export(arguments: Sequence[str]) -> None:
    """Write the student of a run as safetensors, ONNX or a torch.export program, checked, with a model card."""
    parser = _parser("matchdistill export", export)
    parser.add_argument("run", type=_path, help="folder of the run")
    parser.add_argument(
        "--format", type=str, default="safetensors", help="safetensors, onnx, or pt2 (torch.export; not of detectors)"
    )
    parser.add_argument(
        "--out", type=_path, default=None, help="the file; default: export/model.FORMAT in the folder of the run"
    )
    _add_trust(parser)
    options = parser.parse_args(list(arguments))
    import torch

    from matchdistill.runs.card import CARD, CONFIG, recipe_of, write_card
    from matchdistill.runs.export import export as write
    from matchdistill.runs.export import export_detector
    from matchdistill.runs.store import load_student, read_metrics

    model, described = load_student(options.run, options.trust)
    rebuilt, _ = load_student(options.run, options.trust)
    path = options.out or options.run / "export" / f"model.{options.format}"
    recipe, metrics = recipe_of(options.run, path.parent), read_metrics(options.run)
    if described["task"] == "detection":
        difference = export_detector(model, path, options.format, rebuilt)
    else:
        size = described["image_size"]
        difference = write(model, torch.zeros(2, 3, size, size), path, options.format, rebuilt)
    write_card(path, options.format, model, described, recipe, metrics)
    size = f"{path.stat().st_size:,} bytes"
    print(f"{path}: {size}, outputs within {difference:.1g} of the model's; with {CARD} and {CONFIG}")


def _parser(prog: str, command: Callable[[Sequence[str]], None]) -> ArgumentParser:
    """The options of a command that takes no recipe."""
    from jsonargparse import ArgumentParser

    from matchdistill.values import OPTIONS

    return ArgumentParser(prog=prog, exit_on_error=False, description=command.__doc__, parser_mode=OPTIONS)


def _print_metrics(measured: dict[str, Any], title: str, parameters: dict[str, int | None] | None = None) -> None:
    """A table of teacher and student, as the paper gives them: shares of images that they get wrong, or precisions."""
    from rich.table import Table

    from matchdistill.messages import console
    from matchdistill.tasks.base import metric_label

    def error(name: str) -> bool:
        return name.startswith("top")

    table = Table("network", title=title)
    headings = [f"{metric_label(name)}{' error' if error(name) else ''}" for name in measured["student"]]
    for heading in [*headings, *(["parameters"] if parameters else [])]:
        table.add_column(heading, justify="right")
    for role in ("teacher", "student"):
        if measured[role]:
            row = [f"{1 - value if error(name) else value:.2%}" for name, value in measured[role].items()]
            table.add_row(role, *row, *([f"{parameters[role]:,}"] if parameters else []))
    console().print(table)


def _point_to_page(path: Path, opens: bool) -> None:
    """Say where a page is, and open it."""
    if not path.is_file():
        return  # a warning has said why
    print(f"page: {path}")
    if opens:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())


def _compare(arguments: Sequence[str], prog: str, default: str | None = None) -> None:
    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--out", type=_path, default=None, help="folder; default: runs/ and the recipe's name")
        parser.add_argument(
            "--methods", type=str, default=None, help="with commas: none,kd,mgd-amp+kd; default: the recipe's"
        )
        parser.add_argument("--seeds", type=int, default=None, help="runs per method; default: the recipe's")
        parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
        parser.add_argument("--open", action="store_true", help="open the page in a browser at the end")
        if default is not None:
            parser.set_defaults(jobs=max(1, min(8, os.cpu_count() or 1)))

    resolved, config, name = _resolved(prog, options, arguments, default, _grid)
    if config is None:
        return
    from matchdistill.messages import console, whole
    from matchdistill.report.page import REPORT
    from matchdistill.runs.compare import compare as run
    from matchdistill.runs.recipe import LARGEST_SEED, Recipe
    from matchdistill.runs.train import is_first

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
        _point_to_page(out / REPORT, resolved.open)


def _grid(resolved: Namespace, config: dict[str, Any]) -> None:
    """Put the short options --methods and --seeds into the recipe."""
    if resolved.methods is not None:
        config["compare"]["methods"] = [method.strip() for method in resolved.methods.split(",")]
    if resolved.seeds is not None:
        config["compare"]["seeds"] = resolved.seeds


def _resolved(
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
    if name is None and not {"-h", "--help"} & set(rest):
        raise ValueError("no recipe: name a YAML file or a packaged recipe first (see matchdistill recipes list)")
    values = {} if name is None else read_recipe(name)
    parser = recipe_parser(prog, task_of(values, rest))
    parser.usage = f"{prog} {'[RECIPE]' if default else 'RECIPE'} [options]   (RECIPE: a file or a packaged name)"
    options(parser)
    parser.add_argument("--config", type=str, default=None, help="the recipe, instead of naming it first")
    parser.add_argument("--print_config", action="store_true", help="print the whole resolved recipe and stop")
    resolved = resolve_recipe(values, parser, rest)
    config = plain_config(resolved)
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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command for command in (quickstart, fit, compare, report, validate, taps, recipes, export)
}

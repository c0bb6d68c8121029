"""The command taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matchdistill.commands.options import plain_parser

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from rich.table import Table
    from torch import Tensor

    from matchdistill.distiller import MatchingDistiller


def taps(arguments: Sequence[str]) -> None:
    """Show which features of two models would be matched, and why."""
    options = _options(arguments)
    from matchdistill.distiller import MatchingDistiller
    from matchdistill.messages import console, did_you_mean
    from matchdistill.models import Preparation
    from matchdistill.models.build import find_preparation
    from matchdistill.runs.recipe import DEFAULT_TASK
    from matchdistill.tasks import TASKS

    name = options.task or DEFAULT_TASK
    if name not in TASKS:
        raise ValueError(f"--task {name}: expected one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    networks = (options.teacher, options.teacher_options), (options.student, options.student_options)
    teacher, student = (TASKS[name].tapped(network, own) for network, own in networks)
    distiller = MatchingDistiller(teacher, student, reduction=options.reduction, example=_example(options))
    console().print(_table(distiller, f"{options.teacher} -> {options.student}"))
    for network, own in networks if "preparation" in TASKS[name].supports else ():
        try:
            known = find_preparation(network, "pretrained", own)
        except ValueError as error:  # its features can be looked at all the same
            console().print(f"{network}, with its pretrained weights: {error}", soft_wrap=True, markup=False)
            continue
        if known is not None and not (preparation := Preparation.of(known.values)).usual:
            console().print(f"{network}, with its pretrained weights, sees images by {preparation}", soft_wrap=True)


def _options(arguments: Sequence[str]) -> Namespace:
    parser = plain_parser("matchdistill taps", taps)
    parser.add_argument(
        "teacher", type=str, help="torchvision:NAME, timm:NAME, transformers:NAME, smp:NAME or package.module:function"
    )
    parser.add_argument("student", type=str, help="likewise")
    networks = parser.add_argument_group("networks")
    networks.add_argument("--task", type=str, default=None, help="what the models do; default: they classify images")
    networks.add_argument("--teacher_options", type=dict[str, Any], default={}, help="of the function that builds it")
    networks.add_argument("--student_options", type=dict[str, Any], default={}, help="likewise")
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--image_size", type=int, default=None, help="pixels; default: what the models ask for")
    inputs.add_argument("--channels", type=int, default=3, help="of the images")
    inputs.add_argument(
        "--example",
        type=str,
        nargs="+",
        default=None,
        help="inputs of other kinds, each by its shape without the batch: 3x16x112x112 a video, 1x16000 a sequence, 12:int "
        "whole numbers; several for networks of several inputs",
    )
    matching = parser.add_argument_group("matching")
    matching.add_argument("--reduction", type=str, default="amp", help="how matched channels are reduced")
    resolved: Namespace = parser.parse_args(list(arguments))
    return resolved


def _example(options: Namespace) -> Any:
    """What the options say of the networks' inputs; None: nothing."""
    import torch

    if options.example is not None:
        if options.image_size is not None:
            raise ValueError("--example and --image_size are both given: give one of them")
        return tuple(map(_input, options.example))
    if options.image_size is None:
        return None
    if min(options.image_size, options.channels) < 1:
        raise ValueError(f"--image_size {options.image_size} --channels {options.channels}: expected at least 1 each")
    return torch.zeros(2, options.channels, options.image_size, options.image_size)


def _table(distiller: MatchingDistiller, title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for heading in ("teacher tap", "student tap", "channels", "map", "G", "margins", "body"):
        table.add_column(heading, overflow="fold")
    for position in distiller.positions:
        table.add_row(
            *(Text.assemble(str(tap), "\n", (str(tap.reason), "dim")) for tap in (position.teacher, position.student)),
            f"{position.teacher_channels} -> {position.student_channels}",
            " -> ".join(dict.fromkeys("x".join(map(str, size)) for size in position.spatial)),
            str(position.group_size),
            position.margin_norm or "measured",
            f"{position.guided_share:.0%}",
        )
    table.caption = (
        f"body: share of the student's weights that lead to the position; to any: {distiller.guided_share:.0%}"
    )
    return table


def _input(text: str) -> Tensor:
    """A batch of two zeros from a shape, "3x224x224", or "12:int"."""
    import torch

    shape, _, kind = text.partition(":")
    sizes = shape.split("x") if shape else []
    if kind not in ("", "int") or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--example {text}: expected a shape without the batch, such as 3x224x224, or 12:int")
    return torch.zeros(2, *map(int, sizes), dtype=torch.int64 if kind else torch.float32)

"""The command init."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matchdistill.commands.options import path_option, plain_parser

if TYPE_CHECKING:
    from jsonargparse import Namespace

QUESTIONS = {
    "teacher": "the teacher, a network by name, for example timm:resnet50",
    "teacher_weights": "its weights: a file, pretrained, or train to train it on the data first",
    "student": "the student, for example timm:mobilenetv1_100",
    "data": "the data: a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg, or digits",
}
TRAIN = "train"
TEXT = """\
# A student is distilled from its teacher. Run it: matchdistill fit {path}
# Every value can be given on the command line too, and fit --help all explains all of them.
data:
  name: {name}
{root}  batch_size: 64
  workers: 0                   # processes that load images; about as many as there are cores
teacher:
  name: {teacher}
{weights}student:
  name: {student}
  weights: {student_weights}
training:
  epochs: 30
  lr: {lr}
  schedule: cosine
distillation:
  method: {method}
trainer:
  accelerator: auto            # a GPU if there is one
"""


def init(arguments: Sequence[str]) -> None:
    """Write a recipe of your own, with comments: from options, and what is not given is asked on a terminal."""
    parser = plain_parser("matchdistill init", init)
    for name, explained in QUESTIONS.items():
        parser.add_argument(f"--{name}", type=str, default=None, help=explained)
    parser.add_argument("--student_weights", type=str, default=None, help="that it starts from: a file, or pretrained")
    parser.add_argument("--method", type=str, default="mgd-amp", help="what is distilled, and how")
    parser.add_argument("--out", type=path_option, default=None, help="the file; default: recipe.yaml")
    options = parser.parse_args(list(arguments))
    from pathlib import Path

    from matchdistill.files import atomic_write
    from matchdistill.runs.recipe import Recipe, plain_config, recipe_parser, resolve_recipe, task_of
    from matchdistill.values import read_yaml

    path = options.out or Path("recipe.yaml")
    if path.exists():
        raise ValueError(f"{path} exists already: name another file by --out")
    _ask(options)
    text = _text(options, str(path))
    values = read_yaml(text)
    Recipe.of(plain_config(resolve_recipe(values, recipe_parser(task=task_of(values)))))  # what would be refused is
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{path}: matchdistill fit {path}")


def _ask(options: Namespace) -> None:
    """Ask for what is missing, on a terminal.

    Raises:
        ValueError: something is missing, and there is no terminal.
    """
    missing = [name for name in QUESTIONS if getattr(options, name) is None]
    if missing and not sys.stdin.isatty():
        raise ValueError(f"give {', '.join(f'--{name}' for name in missing)}: there is no terminal to ask on")
    for name in missing:
        try:
            while not (answer := input(f"{QUESTIONS[name]}: ").strip()):
                pass
        except EOFError as error:
            raise ValueError(f"no answer: give --{name}") from error
        setattr(options, name, answer)


def _text(options: Namespace, path: str) -> str:
    """The recipe."""
    from matchdistill.data.images import IMAGE_SETS

    known = options.data in IMAGE_SETS
    trains, pretrained = options.teacher_weights == TRAIN, options.student_weights is not None
    return TEXT.format(
        path=path,
        name=_scalar(options.data if known else "folder"),
        root="" if known else f"  root: {_scalar(options.data)}\n",
        teacher=_scalar(options.teacher),
        weights="  training: {epochs: 30, lr: 0.1, schedule: cosine}   # trained on the data first\n"
        if trains
        else f"  weights: {_scalar(options.teacher_weights)}\n",
        student=_scalar(options.student),
        student_weights=_scalar(options.student_weights),
        lr=0.01 if pretrained else 0.1,
        method=_scalar(options.method),
    )


def _scalar(value: Any) -> str:
    """A value as YAML has it on one line."""
    import json

    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text else json.dumps(value)

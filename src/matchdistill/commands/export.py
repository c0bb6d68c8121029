"""The command export."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from matchdistill.commands.options import add_trust, path_option, plain_parser

if TYPE_CHECKING:
    from argparse import Namespace

OF_PUSH = ("private", "revision", "message", "dry_run")


def export(arguments: Sequence[str]) -> None:
    """Write the student of a run as safetensors, ONNX or a torch.export program, checked, with a model card."""
    options = _parsed(arguments)
    from matchdistill.runs.card import CARD, check_files, recipe_of, title_of, write_card
    from matchdistill.runs.hub import Upload, check_export, check_login, push
    from matchdistill.runs.metrics import read_metrics
    from matchdistill.runs.store import load_student
    from matchdistill.runs.summary import read_alone
    from matchdistill.tasks import TASKS
    from matchdistill.tasks.task import CONFIG

    path = options.out or options.run / "export" / f"model.{options.format}"
    if options.push is None:
        if given := [name for name in OF_PUSH if getattr(options, name)]:
            raise ValueError(f"--{given[0]} needs --push USER/NAME")
    else:
        Upload(options.push)  # before anything is written
        check_export(path, options.format)
        if not options.dry_run:
            check_login()
    model, described = load_student(options.run, options.trust)
    task = TASKS[described["task"]]
    if options.format not in task.formats:
        raise ValueError(f"format {options.format!r}: {task.name} is exported as {' or '.join(task.formats)}")
    extra = {} if options.resize is None else {"resize": options.resize}
    if extra and ("resize" not in task.supports or options.resize not in ("inside", "outside")):
        kinds = ", ".join(name for name, each in TASKS.items() if "resize" in each.supports)
        raise ValueError(f"--resize {options.resize}: expected inside or outside, for students of {kinds}")
    rebuilt, _ = load_student(options.run, options.trust)
    recipe, metrics = recipe_of(options.run), read_metrics(options.run)
    card = task.card(model, described, recipe["data"])
    check_files(path.parent, card, with_page=options.push is not None)
    difference = task.export(model, rebuilt, described, path, options.format, **extra)
    alone = read_alone(options.run)
    beside = write_card(
        path, options.format, card, model, described, recipe, metrics, options.license, options.push, alone
    )
    size = f"{path.stat().st_size:,} bytes"
    relative = " (relative, where outputs are above 1)" if difference else ""
    print(f"{path}: {size}, outputs within {difference:.1g} of the model's{relative}; with {CARD} and {CONFIG}")
    if options.push is None:
        return
    message = options.message or f"{title_of(recipe)}, by matchdistill {version('matchdistill')}"
    upload = Upload(options.push, options.private, options.revision, message)
    if not options.dry_run:
        print(push([path, *beside], upload))
        return
    print(f"not sent: {upload}")
    for each in (path, *beside):
        print(f"  {each.name}: {each.stat().st_size:,} bytes")


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = plain_parser("matchdistill export", export)
    parser.add_argument("run", type=path_option, help="folder of the run")
    parser.add_argument(
        "--format", type=str, default="safetensors", help="safetensors, onnx, or pt2 (torch.export), as the task has it"
    )
    parser.add_argument(
        "--out", type=path_option, default=None, help="the file; default: export/model.FORMAT in the folder of the run"
    )
    parser.add_argument(
        "--resize",
        type=str,
        default=None,
        help="of programs for pixels, where logits are resized to the image: inside (default) or outside of the program",
    )
    parser.add_argument("--push", type=str, default=None, help="USER/NAME of the Hugging Face Hub to upload it to")
    parser.add_argument("--private", action="store_true", help="with --push: into a private repository")
    parser.add_argument("--revision", type=str, default=None, help="with --push: the branch; default: the main one")
    parser.add_argument(
        "--message", type=str, default=None, help="with --push: what the commit says; default: what it is"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="with --push: write and list the files, and send nothing"
    )
    parser.add_argument("--license", type=str, default=None, help="for the model card, such as apache-2.0")
    add_trust(parser)
    return parser.parse_args(list(arguments))

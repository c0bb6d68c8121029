"""The command export."""

from __future__ import annotations

from collections.abc import Sequence

from matchdistill.commands.options import add_trust, path_option, plain_parser


def export(arguments: Sequence[str]) -> None:
    """Write the student of a run as safetensors, ONNX or a torch.export program, checked, with a model card."""
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
    add_trust(parser)
    options = parser.parse_args(list(arguments))
    from matchdistill.runs.card import CARD, recipe_of, write_card
    from matchdistill.runs.metrics import read_metrics
    from matchdistill.runs.store import load_student
    from matchdistill.tasks import TASKS
    from matchdistill.tasks.task import CONFIG

    model, described = load_student(options.run, options.trust)
    task = TASKS[described["task"]]
    if options.format not in task.formats:
        raise ValueError(f"format {options.format!r}: {task.name} is exported as {' or '.join(task.formats)}")
    extra = {} if options.resize is None else {"resize": options.resize}
    if extra and ("resize" not in task.supports or options.resize not in ("inside", "outside")):
        kinds = ", ".join(name for name, each in TASKS.items() if "resize" in each.supports)
        raise ValueError(f"--resize {options.resize}: expected inside or outside, for students of {kinds}")
    rebuilt, _ = load_student(options.run, options.trust)
    path = options.out or options.run / "export" / f"model.{options.format}"
    recipe, metrics = recipe_of(options.run, path.parent), read_metrics(options.run)
    difference = task.export(model, rebuilt, described, path, options.format, **extra)
    write_card(path, options.format, model, described, recipe, metrics)
    size = f"{path.stat().st_size:,} bytes"
    print(f"{path}: {size}, outputs within {difference:.1g} of the model's; with {CARD} and {CONFIG}")

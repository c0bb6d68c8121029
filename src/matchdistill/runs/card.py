"""What goes with an exported student: config.json, which loaders read, and a model card for the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.methods import parse_method
from matchdistill.models import weights_file
from matchdistill.models.pretrained import ANY_PRETRAINED
from matchdistill.runs.metrics import RunMetrics, check_schema
from matchdistill.runs.recipe import resolved_config
from matchdistill.runs.store import RECIPE
from matchdistill.tasks import TASKS
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.task import CONFIG, Card

CARD = "model_card.md"
HUB_DATA = {"fashion-mnist": "fashion_mnist", "imagenet": "imagenet-1k"}  # where it has another name there
CITATION = """```bibtex
@inproceedings{yue2020matching,
  title     = {Matching Guided Distillation},
  author    = {Yue, Kaiyu and Deng, Jiangfan and Zhou, Feng},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2020},
  url       = {https://arxiv.org/abs/2008.09958}
}
```"""


def recipe_of(run: Path, folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run whose student is to be described in a folder.

    Raises:
        ValueError: there is none, or it is damaged; or files of the folder that are no export's have the names of those to
            be written, or are of another student.
    """
    if not (run / RECIPE).is_file():
        raise ValueError(
            f"{run} has no {RECIPE}, which says what was distilled: export from the folder that fit has left"
        )
    for path in (folder / CARD, folder / CONFIG):
        if path.exists() and "matchdistill" not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} exists already and is no export's: name a file in another folder by --out")
    check_schema(run)
    recipe = resolved_config(run / RECIPE)
    method = recipe["distillation"]["method"]
    if not recipe["student"]["name"] or (method != "none" and not recipe["teacher"]["name"]):
        raise ValueError(f"{run / RECIPE} is damaged: it names no student, or no teacher for the method {method!r}")
    if (folder / CONFIG).exists():
        there, student = read_json(folder / CONFIG), recipe["student"]["name"]
        name = there.get("name") or f"timm:{there.get('architecture')}"
        if name not in (student, student.partition(".")[0]):
            raise ValueError(
                f"{folder / CONFIG} describes another student, {name}, than {student}: name a file in another folder by "
                "--out"
            )
    return recipe


def write_card(
    exported: Path,
    kind: Format,
    model: nn.Module,
    described: dict[str, Any],
    recipe: dict[str, Any],
    metrics: RunMetrics | None,
) -> None:
    """Write `config.json` and `model_card.md` beside an exported student.

    Args:
        exported: the file.
        kind: its format.
        model: the student.
        described: of the student, as `load_student` gives it.
        recipe: of its run, as `recipe_of` gives it.
        metrics: of its run, as `read_metrics` gives them; None: it was not measured.
    """
    task = TASKS[described["task"]]
    card = task.card(model, described, recipe["data"])
    write_json(exported.with_name(CONFIG), student_config(card, described, recipe["data"]))
    # Those of other formats, exported before, are described too.
    others = [each for each in task.formats if exported.with_suffix(f".{each}").is_file()]
    files = {each: exported.with_suffix(f".{each}").name for each in others} | {str(kind): exported.name}
    parameters = sum(value.numel() for value in model.parameters())
    text = _text(card, recipe, described, metrics, files, parameters)
    atomic_write(
        exported.with_name(CARD),
        lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )


def student_config(card: Card, described: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What loaders read in config.json: of the task, and what every student has.

    Args:
        card: of the student.
        described: the student, as `load_student` gives it.
        data: the recipe's section of that name, as plain values.
    """
    shared = {
        "num_classes": described["num_classes"],
        "label_names": described["class_names"],
        "exported_by": f"matchdistill {version('matchdistill')}",
        **({} if data["white"] is None else {"white": data["white"]}),
    }
    own = {} if card.library == "timm" else {"library_name": card.library, "task": described["task"]}
    return {**own, **card.config, **shared}


def _text(
    card: Card,
    recipe: dict[str, Any],
    described: dict[str, Any],
    metrics: RunMetrics | None,
    files: Mapping[str, str],
    parameters: int,
) -> str:
    student, teacher, method = recipe["student"], recipe["teacher"], recipe["distillation"]["method"]
    beside = TASKS[described["task"]].learns_from
    distilled = method != "none"
    title = _short(student["name"]) + (f" distilled from {_short(teacher['name'])}" if distilled else "")
    head: dict[str, Any] = {
        "library_name": card.library,
        "pipeline_tag": card.pipeline,
        "tags": _tags(card.library, method, files),
    }
    if (base := _base_model(student)) is not None:
        head["base_model"] = base
    if metrics is not None and metrics.measured:
        head["model-index"] = [{"name": title, "results": [_result(card.pipeline, _data(recipe), metrics)]}]
    rows = {
        "student": f"`{student['name']}`, {parameters:,} parameters; {_start(student)}",
        **({"teacher": f"`{teacher['name']}`; {_start(teacher)}{_trained(teacher)}"} if distilled else {}),
        "learns": f"{parse_method(method).learned_beside(beside)}: method `{method}`",
        "data": _data(recipe) + (f", {described['num_classes']} classes" if described["num_classes"] else ""),
        **card.rows,
        **({"training": f"{metrics.epochs} epochs, seed {metrics.seed}"} if metrics is not None else {}),
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _table(["", ""], list(rows.items())),
        *(["## Results", _results(metrics)] if metrics is not None and metrics.measured else []),
        "## Use",
        *(card.use(kind, name) for kind, name in files.items()),
        card.images,
        "## Upload",
        "Choose a license and add it to the block at the top, `license: ...`. The Hub shows `README.md`:",
        f"```\ncp {CARD} README.md\nhf upload USER/NAME . . --exclude {CARD}\n```",
        *(["## Citation", CITATION] if parse_method(method).features == "mgd" else []),
        f"Made by matchdistill {version('matchdistill')}.",
    ]
    return "\n\n".join(sections) + "\n"


def _short(name: str) -> str:
    """A model's name without where it is from."""
    return name.rpartition(":")[2]


def _tags(library: str, method: str, files: Mapping[str, str]) -> list[str]:
    tags = ["matchdistill", *(["timm"] if library == "timm" else []), *(["onnx"] if "onnx" in files else [])]
    return tags if method == "none" else ["knowledge-distillation", *tags]


def _base_model(student: dict[str, Any]) -> str | None:
    """The Hub's name of what the student started from, where it is known."""
    library, _, name = student["name"].partition(":")
    if library != "timm" or student["weights"] is None or _is_file(student["weights"]):
        return None
    import timm

    if student["weights"].lower() not in ANY_PRETRAINED:
        name = f"{name.partition('.')[0]}.{student['weights']}"
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if known is None else known.hf_hub_id


def _is_file(weights: str) -> bool:
    try:
        return weights_file(weights) is not None
    except ValueError:  # one that is not here any more
        return True


def _data(recipe: dict[str, Any]) -> str:
    """What the images are called: one's own by the name of their folder."""
    name, root = recipe["data"].get("name", "folder"), recipe["data"].get("root")
    return Path(root).expanduser().resolve().name if name == "folder" and root else str(name)


def _start(network: dict[str, Any]) -> str:
    """What a network started from; of a file its name alone, as a card is for others."""
    if network["weights"] is None:
        return "from random weights"
    return f"from `{Path(network['weights']).name if _is_file(network['weights']) else network['weights']}`"


def _trained(teacher: dict[str, Any]) -> str:
    epochs = teacher["training"]["epochs"]
    return f", trained for {epochs} epochs before" if epochs else ""


def _result(task: str, data: str, metrics: RunMetrics) -> dict[str, Any]:
    """Of the student, in the Hub's format of `model-index`."""
    values = [
        {"type": metric.hub_type or metric.name, "name": metric.label, "value": round(metrics.student[metric.name], 4)}
        for metric in metrics.measured
    ]
    return {"task": {"type": task}, "dataset": {"type": HUB_DATA.get(data, data), "name": data}, "metrics": values}


def _results(metrics: RunMetrics) -> str:
    """Teacher and student on the validation images."""
    rows = []
    for role in ("teacher", "student"):
        if values := metrics.of(role):
            shown = [metric.shown(values[metric.name]) if metric.name in values else "" for metric in metrics.measured]
            rows.append([role, *shown, f"{metrics.parameters[role]:,}"])
    return _table(["validation images", *(metric.label for metric in metrics.measured), "parameters"], rows)


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

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
from matchdistill.runs.hub import README
from matchdistill.runs.metrics import RunMetrics, check_schema
from matchdistill.runs.recipe import resolved_config
from matchdistill.runs.store import RECIPE
from matchdistill.runs.summary import Mean, conclusion
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


def recipe_of(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run whose student is to be described.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not (run / RECIPE).is_file():
        raise ValueError(
            f"{run} has no {RECIPE}, which says what was distilled: export from the folder that fit has left"
        )
    check_schema(run)
    recipe = resolved_config(run / RECIPE)
    method = recipe["distillation"]["method"]
    if not recipe["student"]["name"] or (method != "none" and not recipe["teacher"]["name"]):
        raise ValueError(f"{run / RECIPE} is damaged: it names no student, or no teacher for the method {method!r}")
    return recipe


def check_files(folder: Path, card: Card, with_page: bool) -> None:
    """Raise a ValueError if the files that `write_card` is to write are there, and are not of this student's export.

    Args:
        folder: where they go.
        card: of the student.
        with_page: whether `README.md` is written too.
    """
    elsewhere = "name a file in another folder by --out"
    foreign = [
        path
        for path in (folder / CARD, folder / CONFIG, *([folder / README] if with_page else []))
        if path.exists() and "matchdistill" not in path.read_text(encoding="utf-8", errors="replace")
    ]
    if not (folder / CONFIG).exists():  # every export writes it, with what its loaders read beside it
        foreign += [folder / name for name in card.beside if (folder / name).exists()]
    if foreign:
        raise ValueError(f"{foreign[0]} exists already and is no export's: {elsewhere}")
    if (folder / CONFIG).exists():
        there, own = _named(read_json(folder / CONFIG)), _named(card.config)
        if there != own:
            raise ValueError(f"{folder / CONFIG} describes another student, {there}, than {own}: {elsewhere}")


def _named(config: Mapping[str, Any]) -> str:
    """What config.json calls a student."""
    return str(config.get("name") or f"timm:{config.get('architecture')}")


def write_card(
    exported: Path,
    kind: Format,
    card: Card,
    model: nn.Module,
    described: dict[str, Any],
    recipe: dict[str, Any],
    metrics: RunMetrics | None,
    license: str | None = None,
    uploaded_as: str | None = None,
    alone: RunMetrics | None = None,
) -> list[Path]:
    """Write `config.json` and `model_card.md` beside an exported student, and what else its loaders read.

    Args:
        exported: the file.
        kind: its format.
        card: of the student, as its task gives it.
        model: the student.
        described: of the student, as `load_student` gives it.
        recipe: of its run, as `recipe_of` gives it.
        metrics: of its run, as `read_metrics` gives them; None: it was not measured.
        license: under which it is given away, in the Hub's words; None: none is chosen.
        uploaded_as: the Hub's name of the repository for which `README.md` is written too; None: for none.
        alone: of the student without its teacher, as `read_alone` gives them; None: it was not trained.

    Returns:
        What belongs on the Hub beside the exported file: `README.md`, `config.json`, and what else its loaders read.
    """
    task = TASKS[described["task"]]
    write_json(exported.with_name(CONFIG), student_config(card, described, recipe["data"]))
    # Those of other formats, exported before, are described too.
    others = [each for each in task.formats if exported.with_suffix(f".{each}").is_file()]
    files = {each: exported.with_suffix(f".{each}").name for each in others} | {str(kind): exported.name}
    parameters = sum(value.numel() for value in model.parameters())
    pages = {CARD: (files, None)} | ({} if uploaded_as is None else {README: ({str(kind): exported.name}, uploaded_as)})
    for name, (shown, own) in pages.items():
        text = _text(card, recipe, described, metrics, shown, parameters, license, own, alone)
        atomic_write(
            exported.with_name(name),
            lambda temporary, text=text: temporary.write_text(text, "utf-8", "backslashreplace"),  # type: ignore[misc]
        )
    for name, values in card.beside.items():
        write_json(exported.with_name(name), values)
    page = [] if uploaded_as is None else [README]
    return [exported.with_name(name) for name in (*page, CONFIG, *card.beside)]


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
    license: str | None,
    uploaded_as: str | None,
    alone: RunMetrics | None,
) -> str:
    """The card; where it has been uploaded, by that name and without how to do so."""
    student, teacher, method = recipe["student"], recipe["teacher"], recipe["distillation"]["method"]
    beside = TASKS[described["task"]].learns_from
    distilled = method != "none"
    title = title_of(recipe)
    head: dict[str, Any] = {
        **({} if license is None else {"license": license}),
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
        *(["## Results", *_results(metrics, alone)] if metrics is not None and metrics.measured else []),
        "## Use",
        *(card.use(kind, name) for kind, name in files.items()),
        card.images,
        *([] if uploaded_as else ["## Upload", _how_to_upload(license)]),
        *(["## Citation", CITATION] if parse_method(method).features == "mgd" else []),
        f"Made by matchdistill {version('matchdistill')}.",
    ]
    return "\n\n".join(sections).replace("USER/NAME", uploaded_as or "USER/NAME") + "\n"


def title_of(recipe: Mapping[str, Any]) -> str:
    """What is distilled from what, in a recipe's plain values."""
    student, teacher = _short(recipe["student"]["name"]), recipe["teacher"]["name"]
    return f"{student} distilled from {_short(teacher)}" if recipe["distillation"]["method"] != "none" else student


def _how_to_upload(license: str | None) -> str:
    choose = "Choose a license, `--license ...`. " if license is None else ""
    command = "```\nmatchdistill export RUN --push USER/NAME\n```"
    return f"{choose}This exports the weights again, and uploads them with `{CONFIG}` and a page like this one:\n\n{command}"


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


def _results(metrics: RunMetrics, alone: RunMetrics | None) -> list[str]:
    """Teacher, student, and the student without its teacher on the validation images, and what this tells of the teacher."""
    rows = []
    found = {"teacher": metrics.teacher, "student": metrics.student, "student alone": alone.student if alone else {}}
    for role, values in found.items():
        if values:
            shown = [metric.shown(values[metric.name]) if metric.name in values else "" for metric in metrics.measured]
            rows.append([role, *shown, f"{metrics.parameters[role.removesuffix(' alone')]:,}"])
    table = _table(["validation images", *(metric.label for metric in metrics.measured), "parameters"], rows)
    if metrics.method == "none":
        return [table]
    if alone is None:
        return [table, "What the student reaches without its teacher is not known."]
    metric = metrics.measured[0]
    change = Mean(metrics.student[metric.name] - alone.student[metric.name], None)
    return [table, f"By its teacher: {change.shown(metric, '+')} {metric.label}; {conclusion(change, 1, metric)}."]


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

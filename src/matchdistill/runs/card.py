"""What goes with an exported student: config.json, which loaders read, and a model card for the Hugging Face Hub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from matchdistill.data.images import preparation
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.models import weights_file
from matchdistill.models.build import ANY_PRETRAINED
from matchdistill.runs.export import Format
from matchdistill.runs.recipe import plain_config, read_recipe, recipe_parser, resolve_recipe, task_of
from matchdistill.runs.settings import parse_method
from matchdistill.runs.store import RECIPE
from matchdistill.tasks.base import metric_label

CARD, CONFIG = "model_card.md", "config.json"
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
    values = read_recipe(run / RECIPE)
    recipe = plain_config(resolve_recipe(values, recipe_parser(task=task_of(values))))
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
    metrics: dict[str, Any] | None,
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
    config = _config(model, described, recipe)
    write_json(exported.with_name(CONFIG), config)
    # Those of other formats, exported before, are described too.
    others = [each for each in ("safetensors", "onnx", "pt2") if exported.with_suffix(f".{each}").is_file()]
    files = {each: exported.with_suffix(f".{each}").name for each in others} | {str(kind): exported.name}
    text = _card(recipe, described, metrics, config, files, sum(value.numel() for value in model.parameters()))
    atomic_write(
        exported.with_name(CARD),
        lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )


def _config(model: nn.Module, described: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """As timm's loaders want it for its models; what it takes to build the others."""
    library, _, name = described["name"].partition(":")
    shared = {
        "num_classes": described["num_classes"],
        "label_names": described["class_names"],
        "exported_by": f"matchdistill {version('matchdistill')}",
    }
    if described["task"] == "detection":
        prepared = {
            "category_ids": described["category_ids"],
            "images": "RGB in 0..1, of any size; the model resizes them",
        }
    else:
        prepared = preparation(recipe["data"]["name"], described["image_size"])
    if library != "timm" or described["task"] == "detection":
        own = {"library_name": _library(described), "task": described["task"], "name": described["name"]}
        return {**own, "options": described["options"], **shared, **prepared}
    known = dict(getattr(model, "pretrained_cfg", {}))
    structure = {key: known[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in known}
    return {
        "architecture": name.partition(".")[0],
        "num_features": getattr(model, "num_features", None),
        **shared,
        **({"model_args": described["options"]} if described["options"] else {}),
        "pretrained_cfg": {**structure, "custom_load": False, "num_classes": described["num_classes"], **prepared},
    }


def _card(
    recipe: dict[str, Any],
    described: dict[str, Any],
    metrics: dict[str, Any] | None,
    config: dict[str, Any],
    files: dict[str, str],
    parameters: int,
) -> str:
    student, teacher, method = recipe["student"], recipe["teacher"], recipe["distillation"]["method"]
    guided, detection = method != "none", described["task"] == "detection"
    title = _short(student["name"]) + (f" distilled from {_short(teacher['name'])}" if guided else "")
    task = "object-detection" if detection else "image-classification"
    head: dict[str, Any] = {
        "library_name": _library(described),
        "pipeline_tag": task,
        "tags": _tags(described, method, files),
    }
    if (base := _base_model(student)) is not None:
        head["base_model"] = base
    if metrics is not None:
        head["model-index"] = [{"name": title, "results": [_result(task, _data(recipe), metrics["student"])]}]
    rows = {
        "student": f"`{student['name']}`, {parameters:,} parameters; {_start(student)}",
        **({"teacher": f"`{teacher['name']}`; {_start(teacher)}{_trained(teacher)}"} if guided else {}),
        "learns": f"{_explained(method)}: method `{method}`",
        "data": f"{_data(recipe)}, {described['num_classes']} classes",
        **({} if detection else {"image size": f"{described['image_size']} x {described['image_size']} px"}),
        **({"training": f"{metrics['epochs']} epochs, seed {metrics['seed']}"} if metrics is not None else {}),
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _table(["", ""], list(rows.items())),
        *(["## Results", _results(metrics)] if metrics is not None else []),
        "## Use",
        *(_use(kind, name, described) for kind, name in files.items()),
        _images(config),
        "## Upload",
        "Choose a license and add it to the block at the top, `license: ...`. The Hub shows `README.md`:",
        f"```\ncp {CARD} README.md\nhf upload USER/NAME . . --exclude {CARD}\n```",
        *(["## Citation", CITATION] if method.startswith("mgd") else []),
        f"Made by {config['exported_by']}.",
    ]
    return "\n\n".join(sections) + "\n"


def _library(described: dict[str, Any]) -> str:
    library = str(described["name"].partition(":")[0])
    known = ("torchvision",) if described["task"] == "detection" else ("timm", "torchvision")
    return library if library in known else "matchdistill"


def _short(name: str) -> str:
    """A model's name without where it is from."""
    return name.rpartition(":")[2]


def _tags(described: dict[str, Any], method: str, files: dict[str, str]) -> list[str]:
    tags = [
        "matchdistill",
        *(["timm"] if _library(described) == "timm" else []),
        *(["onnx"] if "onnx" in files else []),
    ]
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


def _explained(method: str) -> str:
    """What a method's student learns from."""
    parsed = parse_method(method)
    features = {
        "mgd": f"its features by Matching Guided Distillation (channels matched, reduced by `{parsed.reduction}`)",
        "random": f"its features by random groups of channels (reduced by `{parsed.reduction}`)",
        "fitnets": "its features through a trained adapter",
        "at": "its attention maps",
        "ofd": "its features through a trained adapter, with margins",
    }
    taught = [*([features[parsed.features]] if parsed.features else []), *(["its output"] if parsed.kd else [])]
    return f"from labels, and of the teacher {' and '.join(taught)}" if taught else "from labels alone"


def _result(task: str, data: str, measured: dict[str, float]) -> dict[str, Any]:
    """Of the student, in the Hub's format of `model-index`."""
    metrics = [
        {"type": "accuracy" if name == "top1" else name, "name": metric_label(name), "value": round(value, 4)}
        for name, value in measured.items()
    ]
    return {"task": {"type": task}, "dataset": {"type": HUB_DATA.get(data, data), "name": data}, "metrics": metrics}


def _results(metrics: dict[str, Any]) -> str:
    """Teacher and student on the validation images."""
    rows = []
    for role in ("teacher", "student"):
        if measured := metrics[role]:
            count = metrics["parameters"][role]
            rows.append([role, *(f"{value:.2%}" for value in measured.values()), f"{count:,}"])
    labels = [metric_label(name) for name in metrics["student"]]
    return _table(["validation images", *labels, "parameters"], rows)


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _use(kind: str, name: str, described: dict[str, Any]) -> str:
    """How to load a file."""
    detection = described["task"] == "detection"
    if kind == "safetensors" and _library(described) == "timm":
        code = (
            'import timm\nmodel = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )
    elif kind == "safetensors":
        build = "build_detector" if detection else "build_model"
        options = f", **{described['options']!r}" if described["options"] else ""
        code = (
            f"from matchdistill.models import {build}, load_weights\n"
            f"model = {build}({described['name']!r}, {described['num_classes']}{options}).eval()\n"
            f'load_weights(model, "{name}")'
        )
    elif kind == "onnx":
        given = '"image": image.numpy()' if detection else '"images": images.numpy()'
        code = (
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{name}")\n'
            f"outputs = session.run(None, {{{given}}})"
        )
    else:
        code = f'import torch\nmodel = torch.export.load("{name}").module()\nlogits = model(images)'
    return f"```python\n{code}\n```"


def _images(config: dict[str, Any]) -> str:
    """How images are prepared."""
    prepared = config.get("pretrained_cfg", config)
    if "category_ids" in prepared:
        return f"Images (3, H, W): {prepared['images']}. `{CONFIG}` has the names and ids of the categories."
    size, share = prepared["input_size"][1], prepared["crop_pct"]
    resized = f"resized to {math.floor(size / share)} px (the shorter side), of which the middle {size} px are taken"
    return (
        f"Images (N, 3, {size}, {size}): {resized if share < 1 else f'resized to {size} px'}, scaled to 0..1 and normalised "
        f"by mean {prepared['mean']} and deviation {prepared['std']}. `{CONFIG}` has the names of the classes."
    )

"""The folder of a run: what lies in it, and whose it is."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from matchdistill.ending import whole
from matchdistill.files import PARTIAL, atomic_write, is_kind, read_json, remove_partial, write_json
from matchdistill.messages import cause
from matchdistill.models import Preparation, load_weights, save_weights
from matchdistill.models.trust import check_trusted
from matchdistill.models.weights import read_pickle
from matchdistill.runs.metrics import METRICS, check_schema
from matchdistill.runs.places import code_of, keep_folder
from matchdistill.runs.recipe import Recipe, resolved_config
from matchdistill.runs.settings import Machine, Model, Teacher
from matchdistill.runs.training import Training
from matchdistill.tasks import TASKS
from matchdistill.tasks.task import Task

CHECKPOINT, WEIGHTS, RECIPE, MODEL = "last.ckpt", "student.safetensors", "recipe.yaml", "model.json"
# What Lightning, and "results" what the task, reads from a checkpoint, and its kinds.
NEEDED = {
    "state_dict": dict,
    "optimizer_states": list[object],
    "lr_schedulers": list[object],
    "callbacks": dict,
    "loops": {"fit_loop": dict},
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "results": list[object],
}
LATER = {"preparation", "gray"}  # of a description, what the first versions did not write: they had ImageNet's alone
CELLS = "cells"  # the runs of a comparison
# What changes nothing of a run's result: what its sections say so of, and the grid around the run.
INDIFFERENT = {
    "compare",
    *(f"data.{name}" for task in TASKS.values() for name in task.data.options_type.indifferent),
    *(f"trainer.{name}" for name in Machine.indifferent),
    *(f"teacher.{name}" for name in Teacher.indifferent),
}


def save_student(student: nn.Module, recipe: Recipe, out: Path) -> None:
    """Write the student's weights, and what is needed to build it again."""
    save_weights(student, out / WEIGHTS)
    task, data = TASKS[recipe.task], recipe.data
    described = {
        "task": task.name,
        "name": recipe.student.name,
        "options": task.bare(recipe.student.options),
        **({"part": recipe.student.part} if recipe.student.part else {}),
        "num_classes": data.num_classes,
        "class_names": data.class_names,
        **task.describe(data),
    }
    write_json(out / MODEL, described)


def load_student(run: Path, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The student of a run with its final weights, in evaluation mode, and its description.

    Args:
        run: the folder.
        trust: build the network by whatever function the folder names, even one that is of no known library.

    Raises:
        ValueError: the folder holds no finished run, or a damaged one; or building its student would run code that is not
            trusted.
    """
    described = describe_student(run, trust)
    with code_of(run) if trust else contextlib.nullcontext():
        task, names = TASKS[described["task"]], described["class_names"]
        model = task.build(network_of(described), described["num_classes"], names)
    load_weights(model, run / WEIGHTS)
    return model.eval(), described


def network_of(described: dict[str, Any]) -> Model:
    """The network of a student, without its weights, by its description."""
    return Model(described["name"], options=described["options"], part=described.get("part"))


def describe_student(run: Path, trust: bool = False) -> dict[str, Any]:
    """The description of a run's student; the arguments and errors of `load_student`."""
    if not (run / MODEL).is_file() or not (run / WEIGHTS).is_file():
        raise ValueError(
            f"{run} holds no finished run: expected {MODEL} and {WEIGHTS} in it (continue it with fit --resume)"
        )
    described = read_json(run / MODEL, task=str, name=str, options=dict, num_classes=int, class_names=list[str])
    task = TASKS.get(described["task"])
    if task is not None and (run / RECIPE).is_file() and LATER & task.description.keys() - described.keys():
        described = {**_as_before(task, run / RECIPE), **described}
    if (
        task is None
        or not is_kind(described, dict(task.description))
        or len(described["class_names"]) != described["num_classes"]
    ):
        raise ValueError(f"{run / MODEL} is damaged, or of another version: expected a task with what belongs to it")
    if not trust:
        check_trusted(run, (described["name"], described["options"]))
    return described


def _as_before(task: Task, recipe: Path) -> dict[str, Any]:
    """What of `LATER` a run's student had before it was written down: as the images of its recipe are prepared."""
    config = resolved_config(recipe)
    data = task.data(**config["data"])
    data.prepare_as(Preparation.of(config["student"]["preparation"]))
    return {name: value for name, value in task.describe(data).items() if name in LATER}


def check_single(run: Path) -> None:
    """Raise a ValueError if a folder is the one of a comparison, which has the runs in it."""
    if (run / CELLS).is_dir():
        raise ValueError(f"{run} is the folder of a comparison: name one of its runs, {run / CELLS}/METHOD/seedN")


def check_folder(recipe: Recipe, out: Path, resume: bool, other: str) -> None:
    """See that `out` is free, or the folder of this recipe's run or comparison and to be resumed.

    Args:
        recipe: what is to be done there.
        out: the folder.
        resume: whether it may have been begun.
        other: what only a folder of another kind holds, CELLS or CHECKPOINT.

    Raises:
        ValueError: it already holds a run and `resume` is not set, or it holds another recipe's or kind's.
    """
    path = out / RECIPE
    if not path.is_file():
        if strange := [name for name in (CHECKPOINT, METRICS, CELLS) if (out / name).exists()]:
            raise ValueError(f"{out} holds {', '.join(strange)} but no {RECIPE}: choose another --out")
        return
    if (out / other).exists():
        raise ValueError(f"{out} already holds a {'comparison' if other == CELLS else 'run'}: choose another --out")
    if not resume:
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    check_schema(out)
    there = resolved_config(path)  # resolved: values that are left out have their defaults
    before, now = (_decisive(config, out) for config in (there, recipe.config))
    if changed := [key for key, value in now.items() if before.get(key) != value]:
        raise ValueError(
            f"{path} differs in {', '.join(changed)}: resume with the same values, or choose another --out"
        )
    begun = (out / CHECKPOINT).is_file() and not (out / METRICS).is_file()
    if begun and there["data"]["workers"] != recipe.config["data"]["workers"]:
        warnings.warn(
            f"data.workers was {there['data']['workers']} when {out} was begun: other workers vary the images by other "
            "random numbers, so that the end differs a little from an uncut run's",
            stacklevel=3,
        )


def _decisive(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """What a run depends on; the teacher's weights in the comparison around it are where the comparison is."""
    sections = {
        section: {key: own for key, own in value.items() if f"{section}.{key}" not in INDIFFERENT}
        if isinstance(value, dict)
        else value
        for section, value in config.items()
        if section not in INDIFFERENT
    }
    # What is chosen where nothing is given may be given, and a limit in time changes nothing.
    for section, training in ((sections, config["training"]), (sections["teacher"], config["teacher"]["training"])):
        section["training"] = asdict(Training(**{**training, "max_time": None}).settled())
    inside = Path("teacher", WEIGHTS)
    if out.absolute().parent.parent.name == CELLS and str(config["teacher"]["weights"]).endswith(str(inside)):
        sections["teacher"]["weights"] = str(inside)
    return sections


def claim(recipe: Recipe, out: Path) -> None:
    """Make `out` the folder of this recipe, by writing it there, and remove what killed processes have left half-written."""
    remove_partial(out, f"**/.*{PARTIAL}*")
    text = yaml.safe_dump(recipe.config, sort_keys=False)
    atomic_write(out / RECIPE, lambda temporary: temporary.write_text(text))
    keep_folder(out)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that run no code when read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the old file, then replace it.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the old file is left.
        """
        try:
            with whole():
                atomic_write(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        except RuntimeError as error:
            raise OSError(f"cannot write checkpoint {path}: {cause(error)}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read values and tensors only.

        Raises:
            ValueError: the file is truncated or holds anything else.
        """
        checkpoint = read_pickle(path, "checkpoint", map_location or "cpu")
        if not isinstance(checkpoint, dict):
            raise ValueError(
                f"{path} is not the checkpoint of a run: expected a dict, found {type(checkpoint).__name__}"
            )
        if missing := [key for key in NEEDED if key not in checkpoint]:
            raise ValueError(f"{path} is not the checkpoint of a run: it has no {', '.join(missing)}")
        if wrong := [key for key, kind in NEEDED.items() if not is_kind(checkpoint[key], kind)]:
            raise ValueError(f"{path} is damaged: {', '.join(wrong)} has an unexpected type")
        return checkpoint

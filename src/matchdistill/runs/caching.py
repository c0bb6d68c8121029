"""The cache of a teacher's features for a recipe: what it keeps, where, and what that depends on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import re
from pathlib import Path

import torch
from torch import nn

from matchdistill.cache import TeacherCache, check_room
from matchdistill.capture import Captured
from matchdistill.files import path_of
from matchdistill.runs.recipe import Recipe
from matchdistill.slots import GIB, Slots
from matchdistill.tasks import TASKS
from matchdistill.tasks.module import DistilledModule

LIBRARIES = (
    "matchdistill",
    "torch",
    "torchvision",
    "timm",
    "transformers",
)  # another version may compute other features

# Of the data, what no feature of a training image depends on.
INDIFFERENT = {"batch_size", "val_part", "val_limit", "val_root"}


def cache_for(recipe: Recipe, module: DistilledModule) -> TeacherCache | None:
    """The cache of the features that a module takes of its teacher, not opened yet; None: the recipe wants none.

    Raises:
        ValueError: the teacher's values are not of single images, or there is no room for them.
    """
    frozen, settings = module.frozen_teacher, recipe.teacher
    if not recipe.views or frozen is None:
        return None
    example = TASKS[recipe.task].example(recipe.data)
    captured = Captured(arguments=((example,), {}))
    found = frozen(captured)
    values = [found[number] for number in range(len(found))]
    names = [str(tap) for tap in frozen.capture.taps]
    if with_output := recipe.distillation.parsed.kd:
        values.append(captured.teacher_output)
        names.append("the output")
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, torch.Tensor) or len(value) != len(example):
            what = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"teacher.cache keeps values of single images, but of {len(example)} images the teacher's at {name} is "
                f"{what}: train without (--teacher.cache none)"
            )
    shapes = tuple(tuple(value.shape[1:]) for value in values)
    layout = Slots(shapes, getattr(torch, settings.cache_dtype), len(recipe.data.train_set) * recipe.data.views)
    most, root = int(settings.cache_gib * GIB), _root(settings.cache_folder)
    check_room(root, layout.nbytes, most)
    return TeacherCache(root, layout, frozen.model, _told(recipe, frozen.model, names), most, with_output)


def _root(folder: str | None) -> Path:
    if folder is not None:
        return path_of(folder)
    return path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "matchdistill" / "teachers"


def code_of(network: nn.Module) -> str:
    """A digest of what a network computes with its weights: its modules, their settings, their code and the libraries."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(network)).encode())
    for kind in sorted(
        {type(module) for module in network.modules()}, key=lambda kind: (kind.__module__, kind.__qualname__)
    ):
        with contextlib.suppress(OSError, TypeError):  # no file: made as the program runs
            digest.update(inspect.getsource(kind).encode())
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


def _told(recipe: Recipe, network: nn.Module, taps: list[str]) -> dict[str, object]:
    """What features depend on, besides the teacher's weights and the pixels, which are checked for every image."""
    config, data = recipe.config, recipe.data
    left_out = data.options.indifferent | INDIFFERENT
    return {
        "teacher": {name: config["teacher"][name] for name in ("name", "options", "preparation", "part", "engine")},
        "code": code_of(network),
        "taps": taps,
        "data": {name: value for name, value in config["data"].items() if name not in left_out},
        "preparation": data.preparation.plain(),
        "seed": None if data.options.train_limit is None else recipe.seed,
        "views": data.views,
        "trainer": {name: config["trainer"][name] for name in ("precision", "prepare_teacher")},
    }

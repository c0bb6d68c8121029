"""What a recipe trains: student, teacher and distiller, built and looked at before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import safetensors.torch
import torch
from torch import nn

from matchdistill.data.loading import mix_seed
from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller
from matchdistill.models import weights_file
from matchdistill.models.preparation import convert_images
from matchdistill.norms import FeatureNorm, group_norm
from matchdistill.probing import evaluating
from matchdistill.runs.caching import cache_for
from matchdistill.runs.machine import corrupts_memory
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.settings import Model
from matchdistill.runs.starting import load_from_run, run_in
from matchdistill.tasks import TASKS
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.task import preparation_of


def build_module(recipe: Recipe) -> DistilledModule:
    """Student, teacher and distiller of a recipe, the teacher as it is before any training of it.

    Raises:
        ValueError: a model, weights, taps or loss weights that do not fit.
    """
    task, data = TASKS[recipe.task], recipe.data
    data.setup()
    # Of its own, or an untrained teacher would be drawn as the student is.
    teacher = first_teacher(recipe)
    pl.seed_everything(recipe.seed, verbose=False)
    student = _build(recipe, recipe.student, data.num_classes)
    task.check(student, data, "student")
    check_state(student, "student")
    student = task.started(student, recipe, data)
    tried = task.try_training(student, data)
    if not recipe.training.frozen:
        task.check_batches(student, data)
    if recipe.trainer.sync_batchnorm:
        # Before the taps are hooked: the conversion replaces modules.
        student = _synchronised(student)
    distiller = build_distiller(recipe, teacher, student) if teacher is not None else None
    if distiller is not None and recipe.trainer.sync_batchnorm:
        for position in distiller.positions:
            for name, part in position.named_children():
                setattr(position, name, _synchronised(part))
    module = task.module(recipe, data, student, teacher, distiller, tried)
    if recipe.trainer.channels_last and not corrupts_memory(module):
        module.memory_format = torch.channels_last
        for network in (module, module.teacher):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    module.cache = cache_for(recipe, module)
    return module


def first_teacher(recipe: Recipe) -> nn.Module | None:
    """The teacher as a run begins with it; None if it has none. Weights that are not given are random, by the seed."""
    pl.seed_everything(mix_seed("teacher", recipe.seed), verbose=False)
    by_teacher = TASKS[recipe.task].by_teacher and recipe.teacher.name is not None
    return build_teacher(recipe, recipe.teacher.weights) if recipe.distillation.needs_teacher or by_teacher else None


def build_distiller(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> FeatureDistiller | None:
    """The distiller of features of a recipe's method; None where the method has none.

    Raises:
        ValueError: taps or loss weights that do not fit.
    """
    try:
        return _distiller(recipe, teacher, student)
    except ValueError as error:
        if not str(error).startswith("loss_weight"):
            raise
        raise ValueError(f"distillation.weights.{recipe.distillation.weighed_as}: {error}") from error


def _distiller(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> FeatureDistiller | None:
    settings = recipe.distillation
    method, family = settings.parsed, settings.parsed.family
    if family is None:
        return None
    parts = TASKS[recipe.task].parts(teacher, student, recipe, recipe.data)
    prepare = preparation_of(recipe)
    if family.matcher is None:
        assert family.position is not None
        return FeatureDistiller(
            parts.teacher,
            parts.student,
            parts.taps,
            family.position,
            loss_weight=settings.feature_weight,
            example=parts.example,
            prepare=prepare,
        )
    assert method.reduction is not None
    return MatchingDistiller(
        parts.teacher,
        parts.student,
        parts.taps,
        method.reduction,
        loss_weight=settings.feature_weight,
        norm=group_norm if settings.norm == "group" else FeatureNorm,
        loss_reduction=settings.loss_reduction,
        matcher=family.matcher,
        hysteresis=settings.hysteresis,
        example=parts.example,
        prepare=prepare,
        online=settings.refresh_online,
    )


def build_teacher(recipe: Recipe, weights: str | Path | None) -> nn.Module:
    """The teacher of a recipe with the given weights.

    Raises:
        ValueError: a model or weights that do not fit each other or the data.
    """
    # The output of a head that nobody trains is nothing to learn from: then the head of the weights has to fit.
    needs_head = recipe.distillation.parsed.kd and not recipe.teacher.training.epochs
    of_library = weights is not None and weights_file(str(weights)) is None
    teacher = dataclasses.replace(
        recipe.teacher,
        weights=None if weights is None else str(weights),
        fresh_head=recipe.teacher.fresh_head and not needs_head,
    )
    model = _build(recipe, teacher, None if needs_head and of_library else recipe.data.num_classes, needs_head)
    task = TASKS[recipe.task]
    if "preparation" in task.supports:
        convert_images(task.seeing(model), recipe.data.preparation, recipe.teacher.prepared)
    task.check(model, recipe.data, "teacher")
    return model


def _build(recipe: Recipe, named: Model, num_classes: int | None, head: bool = False) -> nn.Module:
    task, names, run = TASKS[recipe.task], recipe.data.class_names, run_in(named.weights)
    model = task.build(named if run is None else dataclasses.replace(named, weights=None), num_classes, names)
    if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        with torch.no_grad(), evaluating(model):
            model(task.example(recipe.data))  # gives lazy modules their sizes
    if run is not None:
        load_from_run(model, named, run, task, names, head)
    return model


def check_state(model: nn.Module, role: str) -> None:
    """Raise a ValueError unless a model's state can be saved as weights: dense tensors alone."""
    for name, value in model.state_dict().items():
        if kind := _unsaved(value):
            raise ValueError(
                f"the {role}'s state_dict() has {name!r}, {kind}: the weights of a run are files of dense tensors. Keep it "
                "out of the state (an attribute, or a buffer with persistent=False), or as a dense tensor"
            )


def _unsaved(value: object) -> str | None:
    """What a value of a state is, if a file of weights cannot hold it."""
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    if value.is_quantized or value.is_nested or value.layout != torch.strided:
        return "a quantized tensor" if value.is_quantized else f"a tensor of layout {value.layout}"
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=value.dtype)})
    except KeyError:
        return f"a tensor of type {value.dtype}"
    return None


def _synchronised(model: nn.Module) -> nn.Module:
    """The model with its batch norms over the images of all processes."""
    return cast("nn.Module", nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]

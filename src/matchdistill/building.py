"""What a recipe trains: student, teacher and distiller, built and looked at before anything starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import pytorch_lightning as pl
import torch
from torch import nn

from matchdistill.baselines import BASELINES
from matchdistill.data import DetectionData, ImageData
from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller, FeatureNorm, group_norm
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.messages import cause
from matchdistill.models import build_detector, build_model, weights_file
from matchdistill.models.detection import check_detector, check_same_input, check_targets, detector_taps, distilled_part
from matchdistill.prepare import foldable, prepared
from matchdistill.recipe import Recipe
from matchdistill.settings import Model, Teacher, parse_method
from matchdistill.taps import Tap
from matchdistill.tasks.base import Task
from matchdistill.tasks.classification import Classification
from matchdistill.tasks.detection import Detection
from matchdistill.trace import Trace

Taps = Literal["auto"] | Sequence[tuple[Tap | str, Tap | str]]
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "classification": build_model,
    "detection": build_detector,
}  # of each task


def build_module(recipe: Recipe) -> Task:
    """Student, teacher and distiller of a recipe, the teacher as it is before any training of it.

    Raises:
        ValueError: a model, weights, taps or loss weights that do not fit.
    """
    data, settings = recipe.data, recipe.distillation
    data.setup()
    teacher = build_teacher(recipe, recipe.teacher.weights) if settings.needs_teacher else None
    pl.seed_everything(recipe.seed, verbose=False)
    named = recipe.student
    student = _build(recipe, named, data.num_classes, named.weights, named.fresh_head)
    check_network(student, data, "student")
    if isinstance(data, DetectionData):
        check_targets(student, data.masks)
    if recipe.trainer.sync_batchnorm:
        # Before the taps are hooked: the conversion replaces modules.
        student = _synchronised(student)
    distiller = build_distiller(recipe, teacher, student) if teacher is not None else None
    if distiller is not None and recipe.trainer.sync_batchnorm:
        for position in distiller.positions:
            for name, part in position.named_children():
                setattr(position, name, _synchronised(part))
    module = make_task(recipe, student, teacher, distiller)
    if recipe.trainer.channels_last:
        module.memory_format = torch.channels_last
        for network in (module, module.guide()):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    return module


def make_task(
    recipe: Recipe, student: nn.Module, teacher: nn.Module | None, distiller: FeatureDistiller | None = None
) -> Task:
    """The Lightning module of a recipe's task."""
    settings = recipe.training, recipe.distillation
    if isinstance(recipe.data, DetectionData):
        return Detection(student, recipe.data.masks, *settings, teacher, distiller)
    prepare = None
    if recipe.trainer.prepare_teacher and teacher is not None and distiller is None:
        prepare = functools.partial(prepared, folds=foldable(Trace(teacher, (example_images(recipe.data),))))
    return Classification(student, recipe.data.num_classes, *settings, teacher, distiller, prepare)


def build_distiller(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> FeatureDistiller | None:
    """The distiller of features of a recipe's method; None where the method has none.

    Raises:
        ValueError: taps or loss weights that do not fit.
    """
    settings = recipe.distillation
    method = parse_method(settings.method)
    if method.features is None:
        return None
    prepare = prepared if recipe.trainer.prepare_teacher else None
    taps: Taps = settings.taps if settings.taps == "auto" else [(first, second) for first, second in settings.taps]
    example = None
    if isinstance(recipe.data, DetectionData):
        seen = [model.get_submodule("transform") for model in (teacher, student)]
        check_same_input(seen[0], seen[1], ("image_mean", "image_std"))
        if settings.pyramid and taps == "auto":
            taps = detector_taps(teacher, student)
        teacher, student = (distilled_part(model, settings.pyramid) for model in (teacher, student))
    else:
        example = example_images(recipe.data)
    if method.features in BASELINES:
        weights = {"fitnets": settings.fitnets_weight, "at": settings.at_weight, "ofd": settings.ofd_weight}
        return FeatureDistiller(
            teacher, student, taps, BASELINES[method.features], weights[method.features], example, prepare=prepare
        )
    assert method.reduction is not None
    return MatchingDistiller(
        teacher,
        student,
        taps,
        method.reduction,
        settings.loss_weight,
        norm=group_norm if settings.norm == "group" else FeatureNorm,
        loss_reduction=settings.loss_reduction,
        matcher=random_assignment if method.features == "random" else solve_assignment,
        hysteresis=settings.hysteresis,
        example=example,
        prepare=prepare,
        online=settings.refresh_online,
    )


def build_teacher(recipe: Recipe, weights: str | Path | None) -> nn.Module:
    """The teacher of a recipe with the given weights.

    Raises:
        ValueError: a model or weights that do not fit each other or the data.
    """
    named = recipe.teacher
    assert named.name is not None
    # The output of a head that nobody trains is nothing to learn from: then the head of the weights has to fit.
    needs_head = parse_method(recipe.distillation.method).kd and not recipe.teacher.training.epochs
    of_library = weights is not None and weights_file(str(weights)) is None
    num_classes = None if needs_head and of_library else recipe.data.num_classes
    model = _build(recipe, named, num_classes, weights, named.fresh_head and not needs_head)
    check_network(model, recipe.data, "teacher")
    return model


def _build(
    recipe: Recipe, named: Model | Teacher, num_classes: int | None, weights: str | Path | None, fresh_head: bool
) -> nn.Module:
    own = {"class_names": recipe.data.class_names} if recipe.task == "detection" else {}
    return BUILDERS[recipe.task](named.name, num_classes, weights, fresh_head, **own, **named.options)


def check_network(model: nn.Module, data: ImageData | DetectionData, role: str) -> None:
    """Raise a ValueError unless the model takes the data's images and gives what its task needs."""
    if isinstance(data, DetectionData):
        check_detector(model, data.masks, role)
    else:
        check_classes(model, data, role)


def check_classes(model: nn.Module, data: ImageData, role: str) -> None:
    """Raise a ValueError unless the model maps images of the data to one logit per class."""
    images = example_images(data)
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the {role} does not take images of shape {tuple(images.shape[1:])}: {cause(error)}"
        ) from error
    finally:
        model.train(was_training)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (len(images), data.num_classes):
        raise ValueError(
            f"the {role} gives {shape} for {len(images)} images, but the data has {data.num_classes} classes: expected "
            f"({len(images)}, {data.num_classes})"
        )


def example_images(data: ImageData) -> torch.Tensor:
    """Images (2, 3, H, W) of the data's size."""
    return torch.zeros(2, 3, data.image_size, data.image_size)


def _synchronised(model: nn.Module) -> nn.Module:
    """The model with its batch norms over the images of all processes."""
    return cast("nn.Module", nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]

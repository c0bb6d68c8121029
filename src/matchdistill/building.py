"""What a recipe trains: student, teacher and distiller, built and looked at before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch
from torch import nn

from matchdistill.baselines import BASELINES
from matchdistill.data import ImageData
from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.messages import cause
from matchdistill.models import build_model, weights_file
from matchdistill.recipe import Recipe
from matchdistill.settings import parse_method
from matchdistill.tasks.classification import Classification


def build_module(recipe: Recipe) -> Classification:
    """Student, teacher and distiller of a recipe, the teacher as it is before any training of it.

    Raises:
        ValueError: a model, weights, taps or loss weights that do not fit.
    """
    data, settings = recipe.data, recipe.distillation
    data.setup()
    teacher = build_teacher(recipe, recipe.teacher.weights) if settings.needs_teacher else None
    pl.seed_everything(recipe.seed, verbose=False)
    named = recipe.student
    student = build_model(named.name, data.num_classes, named.weights, named.fresh_head, **named.options)
    check_classes(student, data, "student")
    if recipe.trainer.sync_batchnorm:
        # Before the taps are hooked: the conversion replaces modules.
        student = _synchronised(student)
    distiller = build_distiller(recipe, teacher, student) if teacher is not None else None
    if distiller is not None and recipe.trainer.sync_batchnorm:
        for position in distiller.positions:
            for name, part in position.named_children():
                setattr(position, name, _synchronised(part))
    module = Classification(student, data.num_classes, recipe.training, settings, teacher, distiller)
    if recipe.trainer.channels_last:
        module.memory_format = torch.channels_last
        for network in (module, module.guide()):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    return module


def build_distiller(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> FeatureDistiller | None:
    """The distiller of features of a recipe's method; None where the method has none.

    Raises:
        ValueError: taps or loss weights that do not fit.
    """
    settings = recipe.distillation
    method = parse_method(settings.method)
    if method.features is None:
        return None
    taps = settings.taps if settings.taps == "auto" else [(first, second) for first, second in settings.taps]
    example = example_images(recipe.data)
    if method.features in BASELINES:
        weights = {"fitnets": settings.fitnets_weight, "at": settings.at_weight, "ofd": settings.ofd_weight}
        return FeatureDistiller(teacher, student, taps, BASELINES[method.features], weights[method.features], example)
    assert method.reduction is not None
    return MatchingDistiller(
        teacher,
        student,
        taps,
        method.reduction,
        settings.loss_weight,
        matcher=random_assignment if method.features == "random" else solve_assignment,
        hysteresis=settings.hysteresis,
        example=example,
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
    model = build_model(named.name, num_classes, weights, named.fresh_head and not needs_head, **named.options)
    check_classes(model, recipe.data, "teacher")
    return model


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

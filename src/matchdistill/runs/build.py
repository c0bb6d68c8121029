"""What a recipe trains: student, teacher and distiller, built and looked at before anything starts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import pytorch_lightning as pl
import safetensors.torch
import torch
from torch import nn

from matchdistill.baselines import BASELINES
from matchdistill.data import DetectionData, ImageData
from matchdistill.data.loading import mix_seed
from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.messages import cause
from matchdistill.models import build_detector, build_model, weights_file
from matchdistill.models.detection import check_detector, check_same_input, check_targets, detector_taps, distilled_part
from matchdistill.position import FeatureNorm, group_norm
from matchdistill.prepare import foldable, prepared
from matchdistill.probing import evaluating, scratch
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.settings import Model, Teacher, parse_method
from matchdistill.taps import Tap
from matchdistill.tasks.base import Task
from matchdistill.tasks.classification import Classification, Place, logits_place, tensor_at
from matchdistill.tasks.detection import Detection
from matchdistill.trace import traced

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
    # Of its own, or an untrained teacher would be drawn as the student is.
    pl.seed_everything(mix_seed("teacher", recipe.seed), verbose=False)
    teacher = build_teacher(recipe, recipe.teacher.weights) if settings.needs_teacher else None
    pl.seed_everything(recipe.seed, verbose=False)
    named = recipe.student
    student = _build(recipe, named, data.num_classes, named.weights, named.fresh_head)
    check_network(student, data, "student")
    check_state(student, "student")
    if isinstance(data, DetectionData):
        check_targets(student, data.masks)
    logits_at = None if isinstance(data, DetectionData) else training_logits(student, data)
    if recipe.trainer.sync_batchnorm:
        # Before the taps are hooked: the conversion replaces modules.
        student = _synchronised(student)
    distiller = build_distiller(recipe, teacher, student) if teacher is not None else None
    if distiller is not None and recipe.trainer.sync_batchnorm:
        for position in distiller.positions:
            for name, part in position.named_children():
                setattr(position, name, _synchronised(part))
    module = make_task(recipe, student, teacher, distiller)
    if isinstance(module, Classification):
        module.logits_at = logits_at
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
        prepare = functools.partial(prepared, folds=foldable(traced(teacher, (example_images(recipe.data),))))
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
            teacher,
            student,
            taps,
            BASELINES[method.features],
            loss_weight=weights[method.features],
            example=example,
            prepare=prepare,
        )
    assert method.reduction is not None
    return MatchingDistiller(
        teacher,
        student,
        taps,
        method.reduction,
        loss_weight=settings.loss_weight,
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
    model = BUILDERS[recipe.task](named.name, num_classes, weights, fresh_head, **own, **named.options)
    if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        images = example_images(recipe.data) if isinstance(recipe.data, ImageData) else [torch.zeros(3, 48, 64)]
        with torch.no_grad(), evaluating(model):
            model(images)  # gives lazy modules their sizes
    return model


def check_network(model: nn.Module, data: ImageData | DetectionData, role: str) -> None:
    """Raise a ValueError unless the model takes the data's images and gives what its task needs."""
    if isinstance(data, DetectionData):
        check_detector(model, data.masks, role)
    else:
        check_classes(model, data, role)


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


def check_classes(model: nn.Module, data: ImageData, role: str) -> None:
    """Raise a ValueError unless the model maps images of the data to one logit per class."""
    images = example_images(data)
    try:
        with torch.no_grad(), scratch(model) as probe:
            output = probe.eval()(images)
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the {role} does not take images of shape {tuple(images.shape[1:])}: {cause(error)}"
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (len(images), data.num_classes):
        raise ValueError(
            f"the {role} gives {shape} for {len(images)} images, but the data has {data.num_classes} classes: expected "
            f"({len(images)}, {data.num_classes})"
        )


def training_logits(student: nn.Module, data: ImageData) -> Place:
    """Where a student's output in training mode, which may be another than in evaluation, holds the logits.

    Raises:
        ValueError: it has none, or the student cannot be trained on images alone.
    """
    images = torch.randn(example_images(data).shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), scratch(student) as probe:
            output = probe.train()(images)
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the student does not take images of shape {tuple(images.shape[1:])} in training mode: {cause(error)}"
        ) from error
    try:
        place = logits_place(output, data.num_classes)
    except ValueError as error:
        raise ValueError(f"in training mode the student {error}") from error
    # With its parts in evaluation mode, it gives the logits of evaluation mode where those of training mode are.
    with contextlib.suppress(Exception), torch.no_grad(), scratch(student) as probe:
        logits = probe.eval()(images)
        probe.training = True
        alike = logits_place(probe(images), data.num_classes, logits)
        if tensor_at(output, alike).shape == logits.shape:
            place = alike
    return place


def example_images(data: ImageData) -> torch.Tensor:
    """Images (2, 3, H, W) of the data's size."""
    return torch.zeros(2, 3, data.image_size, data.image_size)


def _synchronised(model: nn.Module) -> nn.Module:
    """The model with its batch norms over the images of all processes."""
    return cast("nn.Module", nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]

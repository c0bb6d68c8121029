"""The task of classifying images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from matchdistill.data import ImageData
from matchdistill.data.images import DESCRIPTION
from matchdistill.data.module import DataModule
from matchdistill.features import FeatureDistiller
from matchdistill.methods import KD
from matchdistill.models import Preparation
from matchdistill.runs.settings import Model, Settings
from matchdistill.tasks.classification.card import classifier_card
from matchdistill.tasks.classification.checks import check_classes, example_images, training_logits
from matchdistill.tasks.classification.export import ExportedClassifier, export_classifier
from matchdistill.tasks.classification.module import ACCURACIES, ClassificationModule
from matchdistill.tasks.classification.predicting import ClassPredicting
from matchdistill.tasks.classification.probe import freeze_body, start_heads
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.task import Card, Task

LOSSES = ("ce", "bce", "none")


class Classification(Task):
    """Images with one label each."""

    name = "classification"
    module_type: ClassVar[type[ClassificationModule]] = ClassificationModule
    data = ImageData
    metrics: ClassVar[tuple[Metric, ...]] = ACCURACIES
    compared = ("none", "kd", "mgd-sm", "mgd-amp", "mgd-amp+kd")
    description: ClassVar[Mapping[str, Any]] = DESCRIPTION
    formats = get_args(Format)
    supports = frozenset({"kd", "labels", "compile", "preparation", "cache", "engine"})

    def problems(self, settings: Settings) -> Iterator[str]:
        """What of a recipe's settings does not fit the task."""
        yield from super().problems(settings)
        for prefix, training in (("training", settings.training), ("teacher.training", settings.teacher.training)):
            if training.loss not in LOSSES:
                yield f"{prefix}.loss is {training.loss!r}, which is of pixels: {self.name} has {', '.join(LOSSES)}"
        if settings.training.loss == "none" and not (method := settings.distillation).method.endswith(KD):
            yield f"training.loss is 'none': give a method with {KD}, as method {method.method!r} teaches no outputs"
        if settings.training.frozen and settings.distillation.parsed.features is not None:
            yield (
                f"training.frozen trains the head alone, but method {settings.distillation.method!r} teaches features of "
                f"the body: give none or {KD}"
            )
        if settings.teacher.training.loss == "none":
            yield "teacher.training.loss is 'none': a teacher learns from labels, give ce or bce"

    def example(self, data: DataModule) -> Tensor:
        """Images (2, 3, H, W) of the data's size: zeros."""
        return example_images(cast("ImageData", data))

    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network maps images of the data to one logit per class."""
        check_classes(network, cast("ImageData", data), role)

    def started(self, student: nn.Module, settings: Settings, data: DataModule) -> nn.Module:
        """A student whose head has other weights where the settings say so."""
        if (deviation := settings.training.head_std) is not None:
            start_heads(student, settings.student, data.num_classes, deviation)
        return student

    def try_training(self, student: nn.Module, data: DataModule) -> Any:
        """Where the student's output in training mode holds the logits.

        Raises:
            ValueError: it has none, or the student cannot be trained on images alone.
        """
        return training_logits(student, cast("ImageData", data))

    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> ClassificationModule:
        """What trains and measures a classifier."""
        prepare = self.preparing(settings, data, teacher, distiller)
        labels = cast("ImageData", data).train_labels
        if settings.training.frozen:
            freeze_body(student, settings.student, data.num_classes)
        return self.module_type(student, data.num_classes, settings, teacher, distiller, prepare, tried, labels)

    def describe(self, data: DataModule) -> dict[str, Any]:
        """The size of the images, how they are prepared, and whether they are small gray ones."""
        return cast("ImageData", data).described()

    def export(
        self, student: nn.Module, rebuilt: nn.Module, described: dict[str, Any], path: Path, kind: Format
    ) -> float:
        """Write a classifier and read it back to see that it computes the same; see `export_classifier`."""
        size = described["image_size"]
        words = Preparation.of(described["preparation"]).words(size)
        return export_classifier(student, torch.zeros(2, 3, size, size), path, kind, rebuilt, words)

    def load_exported(self, path: Path, data: DataModule | None = None) -> nn.Module:
        """An exported program (.onnx, .pt2) as a student."""
        student = ExportedClassifier(path)
        if data is not None:
            self.check(student, data, "student")
        return student

    def network_of(self, config: Mapping[str, Any]) -> Model | None:
        """The network that a config.json describes, be it one of timm's."""
        if config.get("task", self.name) != self.name:
            return None
        architecture, options = config.get("architecture"), config.get("model_args", {})
        if not isinstance(architecture, str) or not isinstance(options, dict):
            return super().network_of(config)
        return Model(f"timm:{architecture}", options=options)

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> ClassPredicting:
        """How an exported classifier is used on images of one's own."""
        return ClassPredicting.of(config, top)

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported classifier."""
        return classifier_card(student, described)

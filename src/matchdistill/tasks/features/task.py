"""The task of distilling features without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from matchdistill.choice import find_taps
from matchdistill.data import UnlabelledData
from matchdistill.data.module import DataModule
from matchdistill.features import FeatureDistiller
from matchdistill.models import Preparation, build_model
from matchdistill.position import FeaturePosition
from matchdistill.runs.settings import Model, Settings
from matchdistill.tasks.classification.checks import example_images
from matchdistill.tasks.classification.export import export_classifier
from matchdistill.tasks.exporting import Format, export_weights
from matchdistill.tasks.features.backbone import BackboneTask
from matchdistill.tasks.features.card import backbone_card
from matchdistill.tasks.features.module import LIKENESS, WITHOUT_LABELS, FeaturesModule
from matchdistill.tasks.features.pooling import find_pooling, name_part, part_of
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.neighbours import BY_LABELS, KNN
from matchdistill.tasks.task import Card, Parts


class Features(BackboneTask):
    """Features without labels: a student's body learns from a teacher's."""

    name = "features"
    data = UnlabelledData
    metrics = BY_LABELS + WITHOUT_LABELS
    compared = ("none", "fitnets", "at", "mgd-sm", "mgd-amp")
    needed = "whose features are compared with the teacher's"
    supports = frozenset({"pooled", "part", "preparation", "engine"})
    learns_from = ""
    by_teacher = True

    @property
    def comparable(self) -> tuple[Metric, ...]:
        """Neighbours where there are labels, else the likeness to the teacher."""
        return KNN, LIKENESS

    def problems(self, settings: Settings) -> Iterator[str]:
        """What of a recipe's settings does not fit the task."""
        yield from super().problems(settings)
        if settings.teacher.training.epochs:
            yield "teacher.training.epochs is for tasks with labels: give a teacher that is trained already"

    def build(self, model: Model, num_classes: int | None, class_names: Sequence[str] = ()) -> nn.Module:
        """A network by name, with its library's own head unless its options say otherwise."""
        assert model.name is not None
        options = {"num_classes": None, **model.options}
        return name_part(build_model(model.name, weights=model.weights, fresh_head=True, **options), model.part)

    def seeing(self, network: nn.Module) -> nn.Module:
        """The part that is distilled, which alone is run."""
        return part_of(network)

    def measures_loss(self, data: DataModule) -> bool:
        """Where there are no labels."""
        return not cast("UnlabelledData", data).labelled

    def example(self, data: DataModule) -> Tensor:
        """Images (2, 3, H, W) of the data's size: zeros."""
        return example_images(cast("UnlabelledData", data))

    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network, or the part of it that is distilled, makes features of the images."""
        find_pooling(part_of(network), self.example(data), role)

    def parts(self, teacher: nn.Module, student: nn.Module, settings: Settings, data: DataModule) -> Parts:
        """The parts that are named, or the networks.

        Raises:
            ValueError: the pooled output is to be distilled, and a network has none, or batches have one image.
        """
        example, taps = self.example(data), settings.distillation.taps
        ours = part_of(teacher), part_of(student)
        if settings.distillation.pooled:
            if data.options.batch_size == 1:
                raise ValueError(
                    "distillation.pooled compares channels over the images of a batch, and data.batch_size is 1: give at "
                    "least 2"
                )
            last = []
            for role, part in zip(("teacher", "student"), ours, strict=True):
                pooling = find_pooling(part, example, role)
                if pooling.tap is None:
                    raise ValueError(
                        f"distillation.pooled: the {role} gives maps, or makes its pooled output in no module of its own: "
                        "leave it out"
                    )
                last.append(pooling.tap)
            found = find_taps(*ours, example) if taps == "auto" else taps
            taps = [*found, (last[0], last[1])]  # type: ignore[list-item]
        return Parts(*ours, taps, example)

    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> FeaturesModule:
        """What trains and measures a student.

        Raises:
            ValueError: there is nothing to measure by.
        """
        images, labelled = self.example(data), cast("UnlabelledData", data).labelled
        if not labelled and teacher is None:
            raise ValueError(
                "there is nothing to measure: without labels a student is compared with its teacher, which is not named or "
                "has no weights here (teacher.name, teacher.weights)"
            )
        poolings = (
            find_pooling(part_of(student), images, "student"),
            None if teacher is None else find_pooling(part_of(teacher), images, "teacher"),
        )
        compared = None
        if not labelled and distiller is None and teacher is not None:  # to measure a student that is trained already
            compared = FeatureDistiller(
                *self.parts(teacher, student, settings, data)[:3], FeaturePosition, example=images
            )
        return FeaturesModule(student, settings, poolings, labelled, teacher, distiller, compared)

    def tapped(self, name: str, options: dict[str, Any]) -> nn.Module:
        """A network by name, to look at its taps."""
        return build_model(name, **options)

    def describe(self, data: DataModule) -> dict[str, Any]:
        """How images are prepared; and no classes, as the student has no head for those that it was measured by."""
        return {**cast("UnlabelledData", data).described(), "num_classes": 0, "class_names": []}

    def export(
        self, student: nn.Module, rebuilt: nn.Module, described: dict[str, Any], path: Path, kind: Format
    ) -> float:
        """Write a backbone and read it back: the weights of the network, or a program that gives the pooled output."""
        if kind == "safetensors":
            return export_weights(student, rebuilt, path)
        size = described["image_size"]
        images, part = torch.zeros(2, 3, size, size), part_of(student.eval().cpu())
        backbone = find_pooling(part, images, "student").backbone(part)
        words = Preparation.of(described["preparation"]).words(size)
        return export_classifier(backbone, images, path, kind, words=words, output="features")

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported backbone."""
        return backbone_card(student, described)

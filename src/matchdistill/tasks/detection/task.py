"""The task of detecting objects, and of segmenting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from matchdistill.data import DetectionData
from matchdistill.data.module import DataModule
from matchdistill.features import FeatureDistiller
from matchdistill.models import build_detector
from matchdistill.models.huggingface_classes import with_classes
from matchdistill.runs.settings import Model, Settings
from matchdistill.tasks.detection.card import detector_card
from matchdistill.tasks.detection.checks import check_detector, check_same_input, check_targets
from matchdistill.tasks.detection.export import ExportedDetector, export_detector
from matchdistill.tasks.detection.module import PRECISIONS, DetectionModule
from matchdistill.tasks.detection.parts import detector_taps, distilled_part
from matchdistill.tasks.detection.predicting import BoxPredicting
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.task import Card, Parts, Task

CLASSES = 80  # of a detector whose taps are looked at, as COCO has them


class Detection(Task):
    """Images with boxes, and with masks if need be."""

    name = "detection"
    data = DetectionData
    metrics = PRECISIONS
    description: ClassVar[Mapping[str, Any]] = {"category_ids": list[int]}
    formats = ("safetensors", "onnx")
    usual = "torchvision:retinanet_resnet50_fpn"
    supports = frozenset({"pyramid"})

    def build(self, model: Model, num_classes: int | None, class_names: Sequence[str] = ()) -> nn.Module:
        """A detector by name; see `build_detector`."""
        assert model.name is not None
        assert num_classes is not None
        detector = build_detector(
            model.name, num_classes, model.weights, model.fresh_head, class_names=class_names, **model.options
        )
        return with_classes(detector, model.name, model.weights, class_names)

    def example(self, data: DataModule) -> list[Tensor]:
        """One image: a list of zeros (3, H, W)."""
        return [torch.zeros(3, 48, 64)]

    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network has torchvision's API of detectors."""
        check_detector(network, data.options.masks, role)

    def try_training(self, student: nn.Module, data: DataModule) -> Any:
        """Raise a ValueError if the student is trained on what the data does not give."""
        check_targets(student, data.options.masks)

    def parts(self, teacher: nn.Module, student: nn.Module, settings: Settings, data: DataModule) -> Parts:
        """The backbones' bodies, or with the pyramid the backbones.

        Raises:
            ValueError: the networks prepare images differently, or have no pyramids that fit.
        """
        seen = [model.get_submodule("transform") for model in (teacher, student)]
        check_same_input(seen[0], seen[1], ("image_mean", "image_std"))
        pyramid = settings.distillation.pyramid
        taps: Any = settings.distillation.taps
        if pyramid and taps == "auto":
            taps = detector_taps(teacher, student)
        return Parts(distilled_part(teacher, pyramid), distilled_part(student, pyramid), taps)

    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> DetectionModule:
        """What trains and measures a detector."""
        return DetectionModule(student, data.options.masks, settings, teacher, distiller)

    def tapped(self, name: str, options: dict[str, Any]) -> nn.Module:
        """The body of a detector's backbone."""
        return distilled_part(build_detector(name, CLASSES, **options), pyramid=False)

    def describe(self, data: DataModule) -> dict[str, Any]:
        """The ids of the categories."""
        return {"category_ids": cast("DetectionData", data).category_ids.tolist()}

    def export(
        self, student: nn.Module, rebuilt: nn.Module, described: dict[str, Any], path: Path, kind: Format
    ) -> float:
        """Write a detector and read it back to see that it detects the same; see `export_detector`."""
        return export_detector(student, path, kind, rebuilt)

    def load_exported(self, path: Path, data: DataModule | None = None) -> nn.Module:
        """An exported program (.onnx) as a student."""
        return ExportedDetector(path)

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> BoxPredicting:
        """How an exported detector is used on images of one's own."""
        return BoxPredicting.of(config, top)

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported detector."""
        return detector_card(student, described)

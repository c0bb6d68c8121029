"""The task of giving every pixel of an image a class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from matchdistill.choice import find_taps
from matchdistill.data import SegmentationData
from matchdistill.data.module import DataModule
from matchdistill.features import FeatureDistiller
from matchdistill.methods import KD
from matchdistill.models import Preparation, build_segmenter
from matchdistill.models.huggingface_classes import with_classes
from matchdistill.models.segmentation import backbone_of
from matchdistill.runs.settings import Model, Settings
from matchdistill.taps import Tap
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.segmentation.card import segmenter_card
from matchdistill.tasks.segmentation.checks import check_segmenter, check_training
from matchdistill.tasks.segmentation.export import ExportedSegmenter, export_segmenter
from matchdistill.tasks.segmentation.module import PIXELS, SegmentationModule
from matchdistill.tasks.segmentation.outputs import divisor_of
from matchdistill.tasks.segmentation.predicting import PixelPredicting
from matchdistill.tasks.task import Card, Parts, Task

LOSSES = ("ce", "ce+dice", "none")
EXAMPLE_SIDE = 256  # pixels of the images that networks are looked at with, at most


class Segmentation(Task):
    """Images with a class for every pixel."""

    name = "segmentation"
    data = SegmentationData
    metrics = PIXELS
    compared = ("none", "kd", "mgd-sm", "mgd-amp", "mgd-amp+kd")
    description: ClassVar[Mapping[str, Any]] = {"size": int | None, "preparation": dict}
    formats = ("safetensors", "onnx")
    usual = "torchvision:lraspp_mobilenet_v3_large"
    supports = frozenset({"kd", "loss", "label_smoothing", "class_weights", "preparation", "resize", "engine"})

    def problems(self, settings: Settings) -> Iterator[str]:
        """What of a recipe's settings does not fit the task."""
        yield from super().problems(settings)
        teacher = settings.teacher.training
        for prefix, training in (("training", settings.training), ("teacher.training", teacher)):
            if training.loss not in LOSSES:
                yield f"{prefix}.loss is {training.loss!r}: {self.name} has {', '.join(LOSSES)}"
            if training.class_weights == "balanced":
                yield f"{prefix}.class_weights is 'balanced', which counts images: give a number for each class"
        if settings.training.loss == "none" and not (method := settings.distillation).method.endswith(KD):
            yield f"training.loss is 'none': give a method with {KD}, as method {method.method!r} teaches no outputs"
        if teacher.loss == "none":
            yield "teacher.training.loss is 'none': a teacher learns from labels, give ce or ce+dice"

    def build(self, model: Model, num_classes: int | None, class_names: Sequence[str] = ()) -> nn.Module:
        """A network by name; see `build_segmenter`."""
        assert model.name is not None
        network = build_segmenter(model.name, num_classes, model.weights, model.fresh_head, **model.options)
        return with_classes(network, model.name, model.weights, class_names)

    def seeing(self, network: nn.Module) -> nn.Module:
        """The backbone, which is given the images as they come."""
        return network.get_submodule(backbone_of(network))

    def example(self, data: DataModule) -> Tensor:
        """Images (2, 3, H, W) of the size of the training images, up to a limit: zeros."""
        height, width = (min(side, EXAMPLE_SIDE) for side in data.options.crop)
        return torch.zeros(2, 3, height, width)

    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network gives every pixel of the data a class."""
        check_segmenter(network, self.example(data), data.num_classes, role)

    def try_training(self, student: nn.Module, data: DataModule) -> Any:
        """Raise a ValueError unless the student gives logits in training mode, too."""
        check_training(student, self.example(data), data.num_classes)

    def parts(self, teacher: nn.Module, student: nn.Module, settings: Settings, data: DataModule) -> Parts:
        """The backbones; with "kd", or taps outside of the backbones, the whole networks."""
        networks = (teacher, student)
        paths = [backbone_of(network) for network in networks]
        bodies = [network.get_submodule(path) for network, path in zip(networks, paths, strict=True)]
        taps: Any = settings.distillation.taps
        # As the command taps prints them, they are within the backbones.
        inside = taps == "auto" or all(
            _reaches(body, text) for pair in taps for body, text in zip(bodies, pair, strict=True)
        )
        divisor = max(map(divisor_of, networks))
        height, width = (-(-side // divisor) * divisor for side in self.example(data).shape[2:])
        example = torch.zeros(2, 3, height, width)
        if inside and not settings.distillation.parsed.kd:
            return Parts(bodies[0], bodies[1], taps, example)
        if inside:
            found = (
                find_taps(bodies[0], bodies[1], example) if taps == "auto" else [map(Tap.parse, pair) for pair in taps]
            )
            taps = [
                tuple(tap.within(path) if path else tap for tap, path in zip(pair, paths, strict=True))
                for pair in found
            ]
        return Parts(teacher, student, taps, example)

    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> SegmentationModule:
        """What trains and measures a network."""
        prepare = self.preparing(settings, data, teacher, distiller)
        return SegmentationModule(student, data.class_names, settings, teacher, distiller, prepare)

    def tapped(self, name: str, options: dict[str, Any]) -> nn.Module:
        """The backbone of a network."""
        network = build_segmenter(name, 2, **options)
        return network.get_submodule(backbone_of(network))

    def describe(self, data: DataModule) -> dict[str, Any]:
        """The shorter side of the images, and how they are prepared."""
        return {"size": data.options.size, "preparation": data.preparation.plain()}

    def export(
        self,
        student: nn.Module,
        rebuilt: nn.Module,
        described: dict[str, Any],
        path: Path,
        kind: Format,
        resize: Literal["inside", "outside"] = "inside",
    ) -> float:
        """Write a network and read it back to see that it computes the same; see `export_segmenter`."""
        return export_segmenter(student, rebuilt, path, kind, resize, _words(described))

    def load_exported(self, path: Path, data: DataModule | None = None) -> nn.Module:
        """An exported program (.onnx) as a student."""
        student = ExportedSegmenter(path)
        if data is not None:
            self.check(student, data, "student")
        return student

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> PixelPredicting:
        """How an exported network is used on images of one's own."""
        return PixelPredicting.of(config, top)

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported network."""
        return segmenter_card(student, described)


def _words(described: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared, for whoever runs an exported program."""
    preparation = Preparation.of(described["preparation"])
    return {"mean": list(preparation.mean), "std": list(preparation.std), "size": described["size"]}


def _reaches(body: nn.Module, text: str) -> bool:
    """Whether a tap is within a backbone."""
    modules = dict(body.named_modules())
    tap: Tap | None = Tap.parse(text)
    while tap is not None:
        if tap.module not in modules:
            return False
        tap = tap.plus
    return True

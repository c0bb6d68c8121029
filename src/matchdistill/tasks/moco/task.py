"""The task of learning an encoder from images without labels, by MoCo-v2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from matchdistill.data.crops import CropData
from matchdistill.data.module import DataModule
from matchdistill.features import FeatureDistiller
from matchdistill.messages import cause
from matchdistill.models import Preparation
from matchdistill.models.heads import build_body
from matchdistill.probing import scratch
from matchdistill.runs.settings import Model, Settings
from matchdistill.tasks.classification.export import export_classifier
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.features.backbone import BackboneTask
from matchdistill.tasks.moco.card import encoder_card
from matchdistill.tasks.moco.module import INFO_NCE, MocoModule
from matchdistill.tasks.moco.objective import Contrast
from matchdistill.tasks.neighbours import BY_LABELS, KNN
from matchdistill.tasks.task import Card


class Moco(BackboneTask):
    """Images without labels: the student learns what two crops of an image have in common."""

    name = "moco"
    data = CropData
    metrics = (*BY_LABELS, INFO_NCE)
    comparable = (KNN, INFO_NCE)
    compared = ("none", "mgd-amp")
    needed = "as the key encoder has the same modules"
    supports = frozenset({"preparation", "engine"})
    objective = Contrast
    learns_from = "what two crops of an image have in common"

    def build(self, model: Model, num_classes: int | None, class_names: Sequence[str] = ()) -> nn.Module:
        """A network by name without its head: nothing is classified."""
        assert model.name is not None
        return build_body(model.name, model.weights, **_without_head(model.options))

    def tapped(self, name: str, options: dict[str, Any]) -> nn.Module:
        """The network without its head."""
        return build_body(name, **_without_head(options))

    def bare(self, options: dict[str, Any]) -> dict[str, Any]:
        """Without the size of a head, too."""
        return _without_head(super().bare(options))

    def example(self, data: DataModule) -> Tensor:
        """Images (2, 3, H, W) of the data's size: zeros."""
        size = cast("CropData", data).image_size
        return torch.zeros(2, 3, size, size)

    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network maps images of the data to pooled features."""
        self._width(network, data, role)

    def try_training(self, student: nn.Module, data: DataModule) -> int:
        """The width of the student's pooled features, which its head takes."""
        return self._width(student, data, "student")

    def _width(self, network: nn.Module, data: DataModule, role: str) -> int:
        """The width of a network's pooled features in its present mode.

        Raises:
            ValueError: it does not take the images, or gives something else.
        """
        images = self.example(data)
        try:
            with torch.no_grad(), scratch(network) as probe:
                output = probe.eval()(images)
        except Exception as error:  # user code can fail in every way
            raise ValueError(
                f"the {role} does not take images of shape {tuple(images.shape[1:])}: {cause(error)}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the {role} without its head gives {found} for {len(images)} images: expected pooled features (N, width)"
            )
        return output.shape[1]

    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> MocoModule:
        """What trains and measures an encoder."""
        width = tried if tried is not None else self._width(student, data, "student")
        return MocoModule(student, width, settings, cast("CropData", data), teacher, distiller)

    def describe(self, data: DataModule) -> dict[str, Any]:
        """How images are prepared."""
        return cast("CropData", data).described()

    def export(
        self, student: nn.Module, rebuilt: nn.Module, described: dict[str, Any], path: Path, kind: Format
    ) -> float:
        """Write an encoder and read it back to see that it computes the same; see `export_classifier`."""
        size = described["image_size"]
        images, words = torch.zeros(2, 3, size, size), Preparation.of(described["preparation"]).words(size)
        return export_classifier(student, images, path, kind, rebuilt, words, output="features")

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported encoder."""
        with torch.no_grad(), scratch(student) as probe:
            width = probe.eval()(torch.zeros(2, 3, described["image_size"], described["image_size"])).shape[1]
        return encoder_card(student, described, width)


def _without_head(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a network without the size of its head, which is taken off."""
    return {name: value for name, value in options.items() if name != "num_classes"}

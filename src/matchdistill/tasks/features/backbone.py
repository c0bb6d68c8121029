"""What the tasks have in common whose students are backbones: networks that give one vector for each image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

from torch import nn

from matchdistill.data import UnlabelledData
from matchdistill.data.images import DESCRIPTION
from matchdistill.data.module import DataModule
from matchdistill.tasks.classification.export import ExportedClassifier
from matchdistill.tasks.exporting import Format
from matchdistill.tasks.features.predicting import FeaturePredicting
from matchdistill.tasks.task import Task


class BackboneTask(Task):
    """A task whose students give one vector for each image.

    Attributes:
        needed: what measuring a student without labels needs its modules for, in a sentence's end.
    """

    description: ClassVar[Mapping[str, Any]] = DESCRIPTION
    formats = get_args(Format)
    of_classes = False
    needed: ClassVar[str]

    def load_exported(self, path: Path, data: DataModule | None = None) -> nn.Module:
        """An exported program (.onnx, .pt2) as a student."""
        student = ExportedClassifier(path)
        if data is not None:
            self.check(student, data, "student")
            if not cast("UnlabelledData", data).labelled:
                raise ValueError(
                    f"{path}: without labels a student is measured from its weights, {self.needed}: give a file of weights "
                    "(.safetensors, .ckpt)"
                )
        return student

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> FeaturePredicting:
        """How an exported backbone is used on images of one's own."""
        if top is not None:
            raise ValueError("top is for classes and boxes: a backbone gives all of its features, leave it out")
        return FeaturePredicting(config)

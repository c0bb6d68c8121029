"""The task of naming all that an image shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from matchdistill.data import LabelsData
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.classification.task import Classification
from matchdistill.tasks.multilabel.judging import THRESHOLD
from matchdistill.tasks.multilabel.module import PRECISIONS, MultilabelModule
from matchdistill.tasks.multilabel.predicting import LabelPredicting
from matchdistill.tasks.task import Card


class Multilabel(Classification):
    """Images with any number of labels each."""

    name = "multilabel"
    data = LabelsData
    metrics = PRECISIONS
    module_type: ClassVar[type[ClassificationModule]] = MultilabelModule
    supports = frozenset({"kd", "compile", "preparation", "engine"})

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> LabelPredicting:
        """How an exported classifier is used on images of one's own."""
        return LabelPredicting.of(config, top)

    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported classifier."""
        card = super().card(student, described, data)
        said = f"any number an image: each whose sigmoid is {THRESHOLD} or more"
        return dataclasses.replace(card, config={**card.config, "task": self.name}, rows={**card.rows, "labels": said})

"""What a classifier of any number of labels finds in images: every class that is probable.

Axes: N batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.tasks.classification.predicting import Classified, ClassPredicting
from matchdistill.tasks.multilabel.module import found_in

SEPARATOR = "|"  # between labels in a table, as in the tables that data are read from


@dataclass(frozen=True)
class Labelled(Classified):
    """The classes that were found in an image.

    Attributes:
        path: the file of the image.
        labels: names of classes, the most probable one first; there may be none.
        scores: their probabilities.
    """

    @property
    def label(self) -> str:
        """All classes, with "|" between."""
        return SEPARATOR.join(self.labels)

    @property
    def score(self) -> float:
        """The largest probability of those that were found; 0 if none was."""
        return max(self.scores, default=0.0)

    def rows(self) -> list[list[str | float]]:
        """One line: the path, the labels, the scores."""
        return [[self.path, self.label, SEPARATOR.join(f"{score:.6g}" for score in self.scores)]]

    def plain(self, image_id: int) -> list[dict[str, Any]]:
        """One entry: the path, and lists of labels and scores."""
        return [{"path": self.path, "labels": self.labels, "scores": self.scores}]


@dataclass(frozen=True)
class LabelPredicting(ClassPredicting):
    """How a classifier of any number of labels sees pictures.

    Attributes:
        names: of the classes.
        top: the most classes that are named.
    """

    @classmethod
    def of(cls, config: Mapping[str, Any], top: int | None = None) -> LabelPredicting:
        """As a config.json says it; see `ClassPredicting`. Without `top` every class that is found is named."""
        made = super().of(config, top)
        assert isinstance(made, cls)
        return made if top is not None else dataclasses.replace(made, top=len(made.names))

    @property
    def columns(self) -> list[str]:
        """Path, labels and scores."""
        return ["path", "label", "score"]

    def find(self, network: nn.Module, paths: Sequence[str], images: list[Tensor]) -> list[Classified]:
        """The classes of each image."""
        found: list[Classified] = []
        for path, shares in zip(paths, network(torch.stack(images)).float().sigmoid().cpu(), strict=True):
            places = found_in(shares)[: self.top]
            found.append(Labelled(path, [self.names[at] for at in places], [float(shares[at]) for at in places]))
        return found

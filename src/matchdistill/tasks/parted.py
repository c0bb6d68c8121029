"""What the modules of tasks have in common that distil a part of their networks: the backbones of detectors and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric as Measure
from torchmetrics import MetricCollection

from matchdistill.features import FeatureDistiller
from matchdistill.runs.settings import Settings
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule
from matchdistill.teacher import shared_modules, training_kept
from matchdistill.trace import tensors_in

PART = "distiller.student."  # in a state dict: the part of the student that is there as "student." too


class PartModule(DistilledModule):
    """Trains a student of which the distiller, if there is one, sees a part; it may see all of it, too.

    Args:
        student: the network to train.
        settings: of the run.
        metrics: what is measured.
        measures: what computes it, for the student and for the teacher.
        teacher: the whole teacher, to measure.
        distiller: the distiller of corresponding parts of student and teacher, for methods with features.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: Settings,
        metrics: Sequence[Metric],
        measures: Sequence[Measure | MetricCollection],
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
    ) -> None:
        super().__init__(student, settings, metrics, measures, distiller)
        if teacher is not None:
            with training_kept(shared_modules(teacher, student)):
                teacher.eval()
        self._teacher = (teacher,)  # in a tuple: neither trained nor saved with the student

    @property
    def teacher(self) -> nn.Module | None:
        """The whole teacher, if there is one."""
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> PartModule:
        if (teacher := self.teacher) is not None:
            teacher._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def part(self) -> nn.Module | None:
        """What the distiller sees of the student; None: nothing, or all of it."""
        return self.distiller.student if self.distiller is not None and hasattr(self, "student") else None

    def on_train_epoch_end(self) -> None:
        """See that the weights are finite too: what is found in an image does not show it."""
        weights = [value for value in tensors_in(self.network().state_dict()) if value.is_floating_point()]
        largest = torch.stack([value.detach().abs().amax().float() for value in weights if value.numel()])
        self.check_finite({"the largest of the student's weights": largest.amax()})
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the distilled part once."""
        super().on_save_checkpoint(checkpoint)
        if self.part is not None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(PART)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the distilled part where it is looked for."""
        super().on_load_checkpoint(checkpoint)
        if (part := self.part) is not None:
            path = next(
                path
                for path, module in self.named_modules(remove_duplicate=False)
                if module is part and path != PART[:-1]
            )
            state = checkpoint["state_dict"]
            state.update({f"{PART}{name}": state[f"{path}.{name}"] for name in part.state_dict()})

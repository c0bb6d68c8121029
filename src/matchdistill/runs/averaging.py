"""An exponential moving average of a student's weights, which is validated and saved in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from matchdistill.probing import copy_of_model
from matchdistill.tasks.module import DistilledModule

TRAINED = "trained_student"  # in a checkpoint: the weights that the optimiser goes on with


class WeightAverage(Callback):
    """Averages the student's weights after every step of the optimiser.

    Validation and the student at the end have the average; in a checkpoint it is the student of "state_dict", and the
    weights in training lie beside it. The running statistics of batch norms are averaged as the weights that made them
    are, not those of the last weights taken. What counts or points (integers) has no average and is copied.

    Args:
        decay: what the average keeps of itself at every step, between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        self._average_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._trained: dict[str, Tensor] | None = None
        self._steps = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the weights in training from beside the average, which the module has loaded as its own."""
        self._trained, self._steps = checkpoint[TRAINED], checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or with the average of the run that goes on."""
        assert isinstance(pl_module, DistilledModule)
        self._student = pl_module.network()
        self._average = AveragedModel(copy_of_model(self._student), multi_avg_fn=self._update, use_buffers=True)
        self._average.n_averaged.fill_(self._steps)
        if self._trained is not None:
            self._student.load_state_dict(self._trained)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, unless the batch only added to the gradients."""
        if trainer.global_step > self._steps:
            self._average.update_parameters(self._student)
            self._steps = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the student: into its tensors, which DDP and compiled code hold."""
        self._exchange()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the student its weights back."""
        self._exchange()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep both: the average where weights are looked for, the weights in training beside it."""
        path = next(name for name, module in pl_module.named_modules() if module is self._student)
        averaged = self._average.module.state_dict()
        checkpoint[TRAINED] = {name: checkpoint["state_dict"][f"{path}.{name}"] for name in averaged}
        checkpoint["state_dict"].update({f"{path}.{name}": value for name, value in averaged.items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average as the result."""
        self._student.load_state_dict(self._average.module.state_dict())

    def _update(self, average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Average tensors of one type."""
        if average[0].is_floating_point():
            self._average_floats(average, current, count)
        else:
            for mean, value in zip(average, current, strict=True):
                mean.copy_(value)

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, value in zip(_tensors(self._average.module), _tensors(self._student), strict=True):
            kept = value.clone()
            value.copy_(mean)
            mean.copy_(kept)


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())

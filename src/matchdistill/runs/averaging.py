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
PREFIX = "trained_"  # before the names of all parts that are averaged


class WeightAverage(Callback):
    """Averages the student's weights, and the others that a module is measured with, after every step of the optimiser.

    Validation and the student at the end have the average; in a checkpoint it is the student of "state_dict", and the
    weights in training lie beside it. The running statistics of batch norms are averaged as the weights that made them
    are, not those of the last weights taken. What counts or points (integers) has no average and is copied.

    Args:
        decay: what the average keeps of itself at every step, between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        self._average_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._trained: dict[str, dict[str, Tensor]] = {}
        self._steps = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the weights in training from beside the average, which the module has loaded as its own."""
        self._trained = {
            name.removeprefix(PREFIX): value for name, value in checkpoint.items() if name.startswith(PREFIX)
        }
        self._steps = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or with the average of the run that goes on."""
        assert isinstance(pl_module, DistilledModule)
        self._parts = pl_module.averaged
        self._averages = {
            name: AveragedModel(copy_of_model(part), multi_avg_fn=self._update, use_buffers=True)
            for name, part in self._parts.items()
        }
        for average in self._averages.values():
            average.n_averaged.fill_(self._steps)
        for name, state in self._trained.items():
            self._parts[name].load_state_dict(state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, unless the batch only added to the gradients."""
        if trainer.global_step > self._steps:
            for name, average in self._averages.items():
                average.update_parameters(self._parts[name])
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
        for name, part in self._parts.items():
            path = next(path for path, module in pl_module.named_modules() if module is part)
            averaged = self._averages[name].module.state_dict()
            checkpoint[PREFIX + name] = {key: checkpoint["state_dict"][f"{path}.{key}"] for key in averaged}
            checkpoint["state_dict"].update({f"{path}.{key}": value for key, value in averaged.items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average as the result."""
        for name, part in self._parts.items():
            part.load_state_dict(self._averages[name].module.state_dict())

    def _update(self, average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Average tensors of one type."""
        if average[0].is_floating_point():
            self._average_floats(average, current, count)
        else:
            for mean, value in zip(average, current, strict=True):
                mean.copy_(value)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, part in self._parts.items():
            for mean, value in zip(_tensors(self._averages[name].module), _tensors(part), strict=True):
                kept = value.clone()
                value.copy_(mean)
                mean.copy_(kept)


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())

"""The best student of a run, and the end of a run that finds no better one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from safetensors.torch import save
from torch import Tensor

from matchdistill.files import atomic_write, write_json
from matchdistill.runs.evidence import FOLDER
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule

BEST, BEST_VALUES = "best.safetensors", f"{FOLDER}/best.json"
KEPT, STOPPING = "best_student", "early_stop"  # in a checkpoint


class BestStudent(Callback):
    """Keeps the student of the best validation, as it was validated: with a moving average, the average.

    The checkpoint holds it, so that a resumed run has the same one. The files `BEST` and `BEST_VALUES` are written after the
    checkpoint, so they never hold a student of an epoch that a kill has undone. Of equal validations the first is the best.

    Args:
        out: folder of the run.
        metric: by which students are compared.

    Attributes:
        found: "epoch" (from 0), "step", and "student": its metrics by name; empty before the first validation.
    """

    def __init__(self, out: Path, metric: Metric) -> None:
        self.out, self.metric = out, metric
        self.found: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}
        self._written: int | None = None

    def __str__(self) -> str:
        return best_in_words(self.metric, self.found) if self.found else ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the student if it is better."""
        assert isinstance(pl_module, DistilledModule)
        if is_better(self.metric, pl_module.result, self.found.get("student")):
            self.found = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "student": dict(pl_module.result),
            }
            # Copies: the weights go on, and files take no tensors that share memory.
            state = pl_module.network().state_dict()
            self._weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the best student into the checkpoint."""
        checkpoint[KEPT] = {"found": self.found, "weights": self._weights}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the best one so far."""
        self.found, self._weights = checkpoint[KEPT]["found"], checkpoint[KEPT]["weights"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is in the checkpoint now."""
        self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the last epoch came to."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not self.found or self.found["epoch"] == self._written or not trainer.is_global_zero:
            return
        content = save(self._weights)
        atomic_write(self.out / BEST, lambda temporary: temporary.write_bytes(content))
        write_json(self.out / BEST_VALUES, self.found)
        self._written = self.found["epoch"]


def best_in_words(metric: Metric, found: dict[str, Any]) -> str:
    """The best student as `BEST_VALUES` has it, in a line."""
    value = metric.shown(found["student"][metric.name])
    return f"best student: {metric.label} {value} after epoch {found['epoch'] + 1} ({BEST})"


class EarlyStop(Callback):
    """Ends the training after validations in a row without a better one; a run that goes on counts on from its checkpoint.

    Args:
        metric: by which students are compared.
        stop_after: how many validations.

    Attributes:
        epochs: after how many epochs it has ended the training; None: it has not.
    """

    def __init__(self, metric: Metric, stop_after: int) -> None:
        self.metric, self.stop_after = metric, stop_after
        self.epochs: int | None = None
        self._best: dict[str, float] | None = None
        self._since = 0

    def __str__(self) -> str:
        if self.epochs is None:
            return ""
        return f"stopped after epoch {self.epochs}: {self.metric.label} was no better in {self._since} validations in a row"

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from what was counted."""
        known = checkpoint[STOPPING]
        self._best, self._since, self.epochs = known["best"], known["since"], known["epochs"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further where the checkpoint is that of the end."""
        trainer.should_stop = self.epochs is not None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count, before the checkpoint is written."""
        assert isinstance(pl_module, DistilledModule)
        if not pl_module.validates():
            return
        better = is_better(self.metric, pl_module.result, self._best)
        self._best, self._since = (dict(pl_module.result), 0) if better else (self._best, self._since + 1)
        if self._since >= self.stop_after and trainer.current_epoch + 1 != trainer.max_epochs:
            self.epochs = trainer.current_epoch + 1
            trainer.should_stop = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the count."""
        checkpoint[STOPPING] = {"best": self._best, "since": self._since, "epochs": self.epochs}


def is_better(metric: Metric, result: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether a validation is better than the best one so far; what is not a number is better than nothing alone.

    Args:
        metric: by which they are compared.
        result: the metrics of the validation.
        best: the metrics of the best one; None: there is none yet.

    Examples:
        >>> is_better(Metric("top1", "top-1"), {"top1": 0.5}, {"top1": 0.5})
        False
    """
    if best is None or math.isnan(best[metric.name]):
        return True
    value = result[metric.name]
    return value > best[metric.name] if metric.higher_is_better else value < best[metric.name]

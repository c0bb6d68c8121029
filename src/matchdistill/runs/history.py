"""What a run knows of itself over all its resumes, which lives in its checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from matchdistill.data.module import DataModule
from matchdistill.data.reading import FileDataset
from matchdistill.files import write_json
from matchdistill.measuring import peak_memory
from matchdistill.messages import attempt
from matchdistill.runs.evidence import COSTS, EPOCHS
from matchdistill.tasks.module import DistilledModule

HISTORY = "history"  # in a checkpoint
SETS = ("train_set", "val_set")


class History(Callback):
    """Adds up the epochs' values, the seconds and the corrupt images of a run, whatever cut it.

    Args:
        out: folder of the run.
        data: of the run.
        started: by the monotonic clock, when this process began with it.

    Attributes:
        started: as given; what is not the run's own time can be added to it.
    """

    def __init__(self, out: Path, data: DataModule, started: float) -> None:
        self.out, self.data, self.started = out, data, started
        self._before = 0.0
        self._memory: int | None = None
        self._epochs: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """How long the run took so far, but for what a kill has undone."""
        return self._before + time.monotonic() - self.started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the epochs after the checkpoint."""
        self._write(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch before, which is in the checkpoint now."""
        self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last epoch, and keep the most memory that was held."""
        self._write(trainer)
        found = {"memory": self._most_memory(pl_module.device)}
        if trainer.is_global_zero:
            attempt("keep the memory", lambda: write_json(self.out / COSTS, found))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put what is known so far into the checkpoint."""
        assert isinstance(pl_module, DistilledModule)
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            # Of what is not measured in this epoch Lightning has the last value.
            if name.startswith(("train/", "seconds/", "val/" if pl_module.validates() else "train/"))
            and not name.endswith("_step")
        }
        self._epochs = [each for each in self._epochs if each["epoch"] < trainer.current_epoch]
        self._epochs.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **values})
        checkpoint[HISTORY] = {
            "seconds": self.seconds,
            "memory": self._most_memory(pl_module.device),
            "epochs": self._epochs,
            "corrupt": {name: _of_all_ranks(each) for name, each in self._sets().items()},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from what was known; a checkpoint of an older version knows nothing."""
        known = checkpoint.get(HISTORY, {})
        self._before, self._memory = known.get("seconds", 0.0), known.get("memory")
        self._epochs = list(known.get("epochs", []))
        for name, images in self._sets().items():
            numbers = known.get("corrupt", {}).get(name, [])
            images.corrupt[[number for number in numbers if number < len(images)]] = True

    def _most_memory(self, device: torch.device) -> int | None:
        found = [each for each in (self._memory, peak_memory(device)) if each is not None]
        return max(found, default=None)

    def _sets(self) -> dict[str, FileDataset]:
        found = {name: getattr(self.data, name, None) for name in SETS}
        return {name: images for name, images in found.items() if isinstance(images, FileDataset)}

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            write_json(self.out / EPOCHS, {"epochs": self._epochs})


def _of_all_ranks(images: FileDataset) -> list[int]:
    """The numbers of the images that any process has found corrupt."""
    found = images.corrupt.clone()
    if images.skip_corrupt and dist.is_available() and dist.is_initialized():
        marks = [torch.zeros(0, dtype=torch.bool)] * dist.get_world_size()
        dist.all_gather_object(marks, found)
        found = torch.stack(marks).any(0)
    return [int(number) for number in found.nonzero().flatten()]

"""How fast a run trains, and how much of the time it waits for its images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from matchdistill.files import read_json, write_json
from matchdistill.messages import attempt
from matchdistill.runs.evidence import COSTS
from matchdistill.tasks.module import DistilledModule

THROUGHPUT = "throughput"  # in a checkpoint, and in the file of costs


class Throughput(Callback):
    """Adds up the steps of a run, over all its resumes, and the time between them, in which the process waits for a batch.

    It must be the last callback, so that what others do after a step is part of the step. Validations and refreshes of the
    matching are left out. A GPU may still be busy with a step while the process waits for the next batch already: what
    it waits is then more than what is lost.

    Args:
        out: folder of the run.

    Attributes:
        images: that all processes have trained on.
        stepping: seconds of steps.
        waiting: seconds between them, with the start of an epoch's loader.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.images, self.stepping, self.waiting = 0, 0.0, 0.0
        self._moment: dict[str, Any] = {}

    def __str__(self) -> str:
        return speed_in_words(self.plain()) if self.images else ""

    def plain(self) -> dict[str, float]:
        """As the file of costs has it, "waiting" as a share from 0 to 1."""
        seconds = self.stepping + self.waiting
        return {"images_per_second": self.images / seconds, "waiting": self.waiting / seconds, "images": self.images}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock."""
        self._last = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add up the wait for the batch, without the refresh at the start of an epoch."""
        self.waiting += self._passed(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the step, without the refresh before it."""
        self.stepping += self._passed(pl_module)
        self.images += len(batch[0]) * trainer.world_size

    def _passed(self, module: pl.LightningModule) -> float:
        """The seconds since the last look, without the time of a refresh."""
        assert isinstance(module, DistilledModule)
        before, self._last = self._last, time.monotonic()
        refreshing = 0.0 if module.moment is self._moment else module.moment.get("seconds", 0.0)
        self._moment = module.moment
        return max(0.0, self._last - before - refreshing)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums."""
        checkpoint[THROUGHPUT] = {"images": self.images, "stepping": self.stepping, "waiting": self.waiting}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the sums; a checkpoint of an older version has none."""
        known = checkpoint.get(THROUGHPUT, {})
        self.images, self.stepping = known.get("images", 0), known.get("stepping", 0.0)
        self.waiting = known.get("waiting", 0.0)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put it beside the other costs."""

        def keep() -> None:
            costs = read_json(self.out / COSTS) if (self.out / COSTS).is_file() else {}
            write_json(self.out / COSTS, {**costs, THROUGHPUT: self.plain()})

        if self.images and trainer.is_global_zero:
            attempt("keep the throughput", keep)


def speed_in_words(found: dict[str, float]) -> str:
    """What the file of costs has, in a line."""
    speed, waiting = f"{found['images_per_second']:.4g} images per second", f"{found['waiting']:.0%}"
    return f"throughput: {speed}, {waiting} of the time waiting for data"

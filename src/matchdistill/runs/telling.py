"""What the terminal shows of a training: a bar on one line, and lines."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from matchdistill.matching import Matching
from matchdistill.messages import duration
from matchdistill.tasks.module import DistilledModule

SHARE, LEAST = 0.1, 1.0  # of the time, and seconds, from which on refreshes are said to take much
# The tutorial's training of 240 steps loses with a weight of 5 and gains with 1.
STRONG, LONG = (
    3.0,
    1000,
)  # times the task's own loss, above which features are strong; steps from which a training is long


class TrainingBar(Callback):
    """One line for all epochs, with the time that is left. What others print on the same console stands above it.

    Args:
        terminal: where it is shown.
    """

    def __init__(self, terminal: Console) -> None:
        whole = {"table_column": Column(no_wrap=True)}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, **whole),  # type: ignore[arg-type]
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=terminal,
            speed_estimate_period=600,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, with what a resumed run has behind it."""
        steps, epochs = int(trainer.num_training_batches), trainer.max_epochs or 0
        self._task = self.progress.add_task(
            "", total=steps * epochs, completed=steps * trainer.current_epoch, values=""
        )
        self.progress.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which epoch it is."""
        self.progress.update(self._task, description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by a step."""
        self.progress.advance(self._task)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what the epoch came to."""
        self.progress.update(self._task, values="  ".join(_values(trainer, pl_module)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the bar as it is."""
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is, below which the error is told."""
        self.progress.stop()


def _values(trainer: pl.Trainer, module: pl.LightningModule, fresh: bool = False) -> list[str]:
    """What an epoch came to: its losses, then the metric that methods are compared by; fresh: only if it measured that."""
    values = trainer.callback_metrics
    told = [
        f"{name} {float(values[f'train/{name}']):.4g}" for name in ("loss", "features") if f"train/{name}" in values
    ]
    if isinstance(module, DistilledModule) and module.metrics and (module.validates() or not fresh):
        metric = module.metrics[0]
        if f"val/{metric.name}" in values:
            told.append(f"{metric.label} {metric.shown(float(values[f'val/{metric.name}']))}")
    return told


class Narration(Callback):
    """A line for every refresh of the matching; without a progress bar one for every epoch too, and how long it takes."""

    def __init__(self, terminal: Console, epochs: bool) -> None:
        self.terminal, self.epochs = terminal, epochs
        self._told: list[Matching] = []
        self._started: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock before the first epoch of this call."""
        if self._started is None:
            self._started = time.monotonic()
            self._first = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what the refresh before the step came to."""
        if isinstance(pl_module, DistilledModule) and pl_module.refreshed and pl_module.refreshed is not self._told:
            matchings = self._told = pl_module.refreshed
            costs = " ".join(f"{matching.mean_cost:.2f}" for matching in matchings)
            churns = " ".join(f"{matching.churn:.0%}" for matching in matchings if matching.churn is not None)
            self._say(f"matching of {matchings[0].images} images", f"cost {costs}", f"churn {churns}" if churns else "")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the epoch came to; after the first one also how long the others take, and whether refreshes take much."""
        left, passed = (trainer.max_epochs or 0) - trainer.current_epoch - 1, time.monotonic() - (self._started or 0.0)
        is_first = trainer.current_epoch == self._first
        if self.epochs:
            self._say(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *_values(trainer, pl_module, fresh=True)
            )
            if is_first and left > 0:
                self._say(f"about {duration(left * passed)} for {left} more epoch{'s' * (left > 1)}")
        if is_first and left > 0 and isinstance(pl_module, DistilledModule) and self._told:
            settings, seconds = pl_module.distillation, float(pl_module.moment.get("seconds", 0.0))
            by_epochs = settings.refresh_steps is None and not settings.refresh_online
            every = pl_module.refresh_every()
            if by_epochs and isinstance(every, int) and every > 0:
                self._say(costly_refreshes(seconds, passed - seconds, every, self._told[0].images))
        if trainer.current_epoch == 0 and isinstance(pl_module, DistilledModule):
            self._say(self._strong_features(trainer, pl_module))

    @staticmethod
    def _strong_features(trainer: pl.Trainer, module: DistilledModule) -> str:
        """What is said of the first epoch's losses."""
        values, weight = trainer.callback_metrics, None
        if module.method.features is not None:
            weight = module.distillation.feature_weight
        if not isinstance(weight, int | float) or not {"train/features", "train/task"} <= values.keys():
            return ""
        steps = int(trainer.num_training_batches) * (trainer.max_epochs or 0)
        features, task = float(values["train/features"]), float(values["train/task"])
        name = f"distillation.weights.{module.distillation.weighed_as}"
        return strong_features(features, task, steps, name, weight, module.task_loss)

    def _say(self, *parts: str) -> None:
        if any(parts):
            self.terminal.print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)


def costly_refreshes(refresh: float, epoch: float, every: int, images: int) -> str:
    """What is said where refreshes of the matching take more than `SHARE` of the time; empty where they do not.

    Args:
        refresh: seconds of a refresh; below `LEAST` nothing is said.
        epoch: seconds of an epoch without it.
        every: epochs from one refresh to the next.
        images: of a refresh.

    Examples:
        >>> costly_refreshes(7.0, 10.0, 1, 600)  # doctest: +NORMALIZE_WHITESPACE
        'refreshes of the matching take 41% of the time: with distillation.refresh_every 7 or
        distillation.refresh_images 95 about 10%; distillation.refresh_tolerance 0.001 stops each one early'
        >>> costly_refreshes(2.0, 100.0, 1, 20_000)
        ''
    """
    share = refresh / (refresh + every * epoch) if refresh > 0 else 0.0
    if refresh < LEAST or share <= SHARE:
        return ""
    allowed = SHARE / (1 - SHARE) * epoch  # seconds of a refresh in every epoch
    return (
        f"refreshes of the matching take {share:.0%} of the time: with distillation.refresh_every "
        f"{math.ceil(refresh / allowed)} or distillation.refresh_images {max(1, int(images * every * allowed / refresh))} "
        f"about {SHARE:.0%}; distillation.refresh_tolerance 0.001 stops each one early"
    )


def strong_features(
    features: float, task: float, steps: int, name: str, weight: float, own: str = "loss on labels"
) -> str:
    """What is said where a short training has losses of features that are far above the task's own loss; empty elsewhere.

    Args:
        features: the weighted loss of all positions, the mean of the first epoch.
        task: the task's own loss.
        steps: of the training; from `LONG` on nothing is said.
        name: of the weight.
        weight: of the features.
        own: what the task's own loss is called.

    Examples:
        >>> strong_features(30.0, 2.0, 240, "distillation.weights.mgd", 5.0)
        'the loss of features is 15 times the loss on labels, and 240 steps are few: try distillation.weights.mgd 1 too'
        >>> strong_features(30.0, 2.0, 24_000, "distillation.weights.mgd", 5.0)
        ''
    """
    if steps >= LONG or task <= 0 or features <= STRONG * task:
        return ""
    smaller = float(f"{weight * STRONG * task / features:.1g}")
    if smaller >= weight:
        return ""
    return (
        f"the loss of features is {features / task:.0f} times the {own}, and {steps} steps are few: "
        f"try {name} {smaller:g} too"
    )

"""One run: train a student as a recipe says, in a folder that can be taken up again at any epoch."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import subprocess
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from matchdistill import ending
from matchdistill.data import DetectionData, ImageData
from matchdistill.data.loading import mix_seed
from matchdistill.files import remove_partial, write_json
from matchdistill.locking import LOCK, held
from matchdistill.matching import Matching
from matchdistill.messages import attempt, cause, console
from matchdistill.models import load_weights
from matchdistill.report.page import REPORT, write_report
from matchdistill.runs.averaging import WeightAverage
from matchdistill.runs.build import build_module
from matchdistill.runs.evidence import Evidence, look
from matchdistill.runs.history import History
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.settings import Machine
from matchdistill.runs.store import (
    CELLS,
    CHECKPOINT,
    METRICS,
    WEIGHTS,
    AtomicCheckpoints,
    check_folder,
    claim,
    read_metrics,
    save_student,
)
from matchdistill.tasks.base import Task, metric_label

_started: list[list[subprocess.Popen[bytes]]] = []  # processes of trainings over several, as their launchers list them


def fit(recipe: Recipe, out: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the student of a recipe, its teacher first where the recipe says so.

    Writes into `out`, which it holds against other writers: the recipe, `last.ckpt` at the end of every epoch, logs, and
    when done `student.safetensors` with `model.json`, `metrics.json` and the page `report.html`, made from these and
    `evidence/`. A run that was killed goes on from its last whole epoch and ends as it would have.

    Args:
        recipe: what to do.
        out: folder of the run.
        resume: go on with the run in `out`; a finished one is returned as it is.
        quiet: no progress on the terminal.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        ValueError: `out` holds a run already and `resume` is not set, or holds another recipe's, or another process writes
            there; a model or data that does not fit.
        FloatingPointError: a loss that is not finite.
        KeyboardInterrupt, Terminated: it was told to end, by Ctrl-C or SIGTERM.
    """
    first = is_first(recipe.trainer)
    with ending.orderly():
        if first and (out / METRICS).is_file() and (out / REPORT).is_file() and not (out / LOCK).exists():
            check_folder(recipe, out, resume, other=CELLS)  # nothing is written
            return read_metrics(out) or {}
        with held(out) if first else contextlib.nullcontext():
            if first:
                check_folder(recipe, out, resume, other=CELLS)
            if (done := read_metrics(out)) is None:
                return _train(recipe, out, resume, quiet)
            if first:  # the run was cut as it made its page
                remove_partial(out)
                if not (out / REPORT).is_file():
                    attempt("write the page", lambda: write_report([out]))
            return done


def _train(recipe: Recipe, out: Path, resume: bool, quiet: bool) -> dict[str, Any]:
    """The run itself, in a folder that is this process's."""
    started = time.monotonic()
    first = is_first(recipe.trainer)
    terminal = console(quiet=quiet or not first)
    quieten()
    data = recipe.data
    module = build_module(recipe)
    student, teacher = module.network(), module.guide()
    guide = recipe.for_teacher() if teacher is not None and recipe.teacher.training.epochs else None
    history = History(out, data, started)
    trainer = _trainer(recipe, out, terminal, history)
    if recipe.trainer.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm needs GPUs: several processes on the CPU train without it")
    if recipe.trainer.compile:
        check_compiler(trainer.strategy.root_device)
    for each in (data, *([guide.data] if guide is not None else [])):
        each.check_shares(trainer.world_size)
    # Only now: a recipe with a mistake leaves nothing behind, and nothing was trained for it.
    if first:
        claim(recipe, out)
    seconds = 0.0
    if teacher is not None and guide is not None:
        if first and read_metrics(out / "teacher") is None:
            look_at(data)
        begun = time.monotonic()
        seconds = fit(guide, out / "teacher", resume, quiet)["seconds"]
        history.started += time.monotonic() - begun
        load_weights(teacher, out / "teacher" / WEIGHTS)
    if module.distiller is not None:
        terminal.print(str(module.distiller), highlight=False, soft_wrap=True)
    checkpoint = out / CHECKPOINT
    start = Start()
    trainer.callbacks.insert(0, start)  # type: ignore[attr-defined]
    resumed = checkpoint.exists()
    try:
        trainer.fit(module, data, ckpt_path=checkpoint if resumed else None, weights_only=True)
    except Exception as error:  # what does not fit fails in every way
        if start.begun or not resumed or str(checkpoint) in str(error):
            raise
        raise ValueError(
            f"{checkpoint} does not fit this run, it is damaged or of another version ({cause(error)}): choose another --out"
        ) from error
    metrics = {
        "method": recipe.distillation.method,
        "seed": recipe.seed,
        "epochs": recipe.training.all_epochs,
        "student": module.result,
        "teacher": module.teacher_result,
        "parameters": {"student": _parameters(student), "teacher": _parameters(teacher)},
        "corrupt_images": _of_all_ranks(data.corrupt),
        "seconds": round(seconds + history.seconds, 1),
    }
    if trainer.is_global_zero:
        save_student(module.network(), recipe, data, out)
        look(module, data, out, trainer.strategy.root_device)
        write_json(out / METRICS, metrics)  # last: what has metrics is finished, but for its page
        attempt("write the page", lambda: write_report([out]))
    trainer.strategy.barrier()
    return metrics


def look_at(data: ImageData | DetectionData) -> None:
    """See that the first batches can be read, before a teacher is trained for hours."""
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with contextlib.closing(cast("Generator[Any]", iter(loader))) as batches:  # which ends its workers
            next(batches, None)


def _trainer(recipe: Recipe, out: Path, terminal: Console, history: History) -> pl.Trainer:
    machine = recipe.trainer
    out = out.absolute()  # Lightning takes "~" for a home
    on_terminal = terminal.is_terminal and not terminal.quiet
    checkpoints = ModelCheckpoint(
        dirpath=out, filename=Path(CHECKPOINT).stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    callbacks: list[Callback] = [
        SeedEpochs(recipe.seed),
        Narration(terminal, not on_terminal),
        Evidence(out),
        history,
        Signals(),
        checkpoints,
    ]
    if recipe.training.ema is not None:
        callbacks.append(WeightAverage(recipe.training.ema))
    if machine.compile:
        callbacks.append(Compilation())
    if on_terminal:
        callbacks.append(ProgressBars(leave=True))
    return machine_trainer(
        machine,
        max_epochs=recipe.training.all_epochs,
        accumulate_grad_batches=recipe.training.accumulate,
        log_every_n_steps=machine.log_every,
        callbacks=callbacks,
        logger=[TensorBoard(out, "logs", "tensorboard"), CSVLogger(out, "logs")],
        plugins=[AtomicCheckpoints()],
        num_sanity_val_steps=0,
        enable_progress_bar=on_terminal,
    )


def machine_trainer(machine: Machine, **options: Any) -> pl.Trainer:
    """A Lightning trainer for a machine, with further options of Lightning's.

    Raises:
        ValueError: values that Lightning or this computer does not have.
    """
    try:
        trainer = pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.num_nodes,
            strategy=machine.strategy,
            precision=machine.precision,
            deterministic=machine.deterministic,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **options,
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"trainer does not fit this machine: {cause(error)}") from error
    if machine.precision == "16-mixed" and trainer.precision == "bf16-mixed":
        raise ValueError(f"trainer.precision {machine.precision!r} needs a GPU: give 'bf16-mixed' or '32-true' here")
    return trainer


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Raise a ValueError unless torch.compile works for a device."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # compilers fail in every way
        raise ValueError(
            "trainer.compile needs a C++ compiler that torch.compile can use: install one (g++, or what CXX names), or "
            f"train without: {cause(error)}"
        ) from error


class Start(Callback):
    """Knows whether the training has begun, before which a checkpoint is restored."""

    begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """It has."""
        self.begun = True


class Signals(Callback):
    """Ctrl-C and SIGTERM are the run's, not Lightning's, whose handlers wait for other processes that may be gone."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has just set its own."""
        ending.take_signals()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the processes that this one has started, which take part in the trainings after this one too."""
        _started.append(getattr(trainer.strategy.launcher, "procs", []))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the processes that this one has started, which would wait for it; or end as one of them that was told to."""
        codes = set()
        processes = [process for started in _started for process in started]
        for started in _started:
            started.clear()  # Lightning watches them, and kills this process too when one is gone
        for process in processes:
            if isinstance(exception, RuntimeError):  # what comes of a process that does not answer any more
                with contextlib.suppress(subprocess.TimeoutExpired):
                    codes.add(process.wait(timeout=3))
            process.kill()
            process.wait()
        _started.clear()
        for number, code in ending.CODES.items():
            if code in codes:
                raise ending.exception(number) from exception


class TensorBoard(TensorBoardLogger):
    """TensorBoard's logs in the folder that is named: Lightning would take "$HOME" in it for a variable."""

    @property
    def log_dir(self) -> str:
        """The folder of the logs."""
        return str(Path(self.root_dir, str(self.version)))


class SeedEpochs(Callback):
    """Seeds everything anew at each epoch, so that a resumed run draws what the uninterrupted one would have."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed by run, epoch and rank."""
        seed = mix_seed("epoch", self.seed, trainer.current_epoch, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class Compilation(Callback):
    """Compiles student, teacher and the losses of the positions: in place, which leaves the names of weights as they are."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only now are they on their device, the teacher as a copy."""
        assert isinstance(pl_module, Task)
        # What was compiled for other networks of the same classes would be taken for these, without their hooks.
        torch.compiler.reset()
        for network in (pl_module.network(), pl_module.guide()):
            if network is not None:
                network.compile()
        for position in () if pl_module.distiller is None else pl_module.distiller.positions:
            position.compile(dynamic=True)


class ProgressBars(RichProgressBar):
    """Rich bars with the names as short as they are clear."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics beside a bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name.rpartition("/")[2]: value for name, value in metrics.items() if name != "v_num"}


class Narration(Callback):
    """A line for every refresh of the matching, and without a progress bar one for every epoch."""

    def __init__(self, terminal: Console, epochs: bool) -> None:
        self.terminal, self.epochs = terminal, epochs
        self._told: list[Matching] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what the refresh before the step came to."""
        if isinstance(pl_module, Task) and pl_module.refreshed and pl_module.refreshed is not self._told:
            matchings = self._told = pl_module.refreshed
            costs = " ".join(f"{matching.mean_cost:.2f}" for matching in matchings)
            churns = " ".join(f"{matching.churn:.0%}" for matching in matchings if matching.churn is not None)
            self._say(f"matching of {matchings[0].images} images", f"cost {costs}", f"churn {churns}" if churns else "")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the epoch came to."""
        if self.epochs:
            values = trainer.callback_metrics
            shown = {"loss": "train/loss", "features": "train/features"}
            if isinstance(pl_module, Task) and pl_module.validates():
                shown[metric_label(pl_module.metric)] = f"val/{pl_module.metric}"
            parts = [f"{label} {float(values[name]):.4g}" for label, name in shown.items() if name in values]
            self._say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *parts)

    def _say(self, *parts: str) -> None:
        self.terminal.print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)


def is_first(machine: Machine) -> bool:
    """Whether this is the process that writes and reports: the only one, or rank 0.

    Ranks in the environment count where there are several processes alone: one of SLURM's tasks, or what is left of another
    run, may have any.
    """
    quieten()
    trainer = machine_trainer(machine, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]  # by which Lightning logs and warns
    return bool(trainer.is_global_zero)


def _of_all_ranks(names: list[str]) -> list[str]:
    """What the processes of a run have found, together."""
    found: list[list[str]] = [names]
    if dist.is_available() and dist.is_initialized():
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, names)
    return sorted(set().union(*found))


def _parameters(model: nn.Module | None) -> int | None:
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def quieten() -> None:
    """Keep Lightning's hints about hardware and loaders out of the output."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")

"""What happens beside the steps of a training: seeds, signals, compilation, a limit in time."""

from __future__ import annotations

import contextlib
import functools
import random
import subprocess
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from matchdistill import ending
from matchdistill.data.loading import mix_seed
from matchdistill.lookup import own_function
from matchdistill.messages import cause
from matchdistill.runs.machine import corrupts_memory
from matchdistill.tasks.module import DistilledModule

_started: list[list[subprocess.Popen[bytes]]] = []  # processes of trainings over several, as their launchers list them


def own_callbacks(settings: list[dict[str, Any]]) -> list[Callback]:
    """The callbacks that `Machine.callbacks` names, looked for in the current folder too.

    Raises:
        ValueError: there is no such class (the nearest are suggested), it is none of callbacks, or it cannot be built.
    """
    return [_own_callback(each["class_path"], each.get("init_args", {})) for each in settings]


def _own_callback(path: str, arguments: dict[str, Any]) -> Callback:
    module, _, name = path.rpartition(".")
    found = own_function(f"{module}:{name}", "trainer.callbacks", kind="class")
    if not isinstance(found, type) or not issubclass(found, Callback):
        raise ValueError(f"trainer.callbacks: {path} is not a pytorch_lightning.Callback: expected a class of them")
    try:
        return _named(found(**arguments), path)
    except Exception as error:  # user code can fail in every way
        raise ValueError(f"trainer.callbacks: {path} cannot be built with these init_args ({cause(error)})") from error


def _named(callback: Callback, path: str) -> Callback:
    """A callback whose errors say that they are its own."""
    for hook in (name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")):
        if getattr(type(callback), hook) is not getattr(Callback, hook):
            setattr(callback, hook, functools.partial(_run_hook, getattr(callback, hook), f"{path} failed in {hook}"))
    return callback


def _run_hook(hook: Callable[..., Any], failed: str, *arguments: Any, **options: Any) -> Any:
    try:
        return hook(*arguments, **options)
    except Exception as error:  # user code can fail in every way
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"trainer.callbacks: {failed} ({cause(error)}, {frame.filename}:{frame.lineno})") from error


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
                    codes.add(process.wait(timeout=10))  # a busy machine takes some seconds to end one
            process.kill()
            process.wait()
        _started.clear()
        for number, code in ending.CODES.items():
            if code in codes:
                raise ending.exception(number) from exception


class TimeLimit(Callback):
    """Ends the training after the epoch in which the time is over, unless it is the last one.

    Args:
        seconds: how long it may take.
        started: by the monotonic clock, since when.

    Attributes:
        epochs: after how many epochs it has ended the training; None: it has not.
    """

    def __init__(self, seconds: float, started: float) -> None:
        self.seconds, self.started = seconds, started
        self.epochs: int | None = None
        self._of: int | None = None

    def __str__(self) -> str:
        return "is not over" if self.epochs is None else f"is over after epoch {self.epochs} of {self._of}"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock of rank 0."""
        over = trainer.strategy.broadcast(time.monotonic() - self.started >= self.seconds)
        if over and not trainer.should_stop and trainer.current_epoch + 1 != trainer.max_epochs:
            self.epochs, self._of = trainer.current_epoch + 1, trainer.max_epochs
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let Lightning take no other process's end for a failure."""
        if self.epochs is not None:
            for started in _started:
                started.clear()


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
        assert isinstance(pl_module, DistilledModule)
        # What was compiled for other networks of the same classes would be taken for these, without their hooks.
        torch.compiler.reset()
        for network in (pl_module.network(), pl_module.teacher):
            if network is not None:
                # Where not forbidden, the compiler puts the channels of convolutions innermost by itself.
                network.compile(options={"layout_optimization": False} if corrupts_memory(network) else {})
        for position in () if pl_module.distiller is None else pl_module.distiller.positions:
            position.compile(dynamic=True)

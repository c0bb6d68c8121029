"""One run: train a student as a recipe says, in a folder that can be taken up again at any epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from torch import nn

from matchdistill import ending
from matchdistill.data.module import DataModule
from matchdistill.files import remove_partial
from matchdistill.locking import LOCK, held
from matchdistill.messages import attempt, cause, console
from matchdistill.models import load_weights
from matchdistill.report.page import REPORT, write_report
from matchdistill.runs.averaging import WeightAverage
from matchdistill.runs.best import BestStudent, EarlyStop
from matchdistill.runs.build import build_module
from matchdistill.runs.callbacks import (
    Compilation,
    SeedEpochs,
    Signals,
    Start,
    TimeLimit,
    own_callbacks,
)
from matchdistill.runs.evidence import Evidence, keep_environment
from matchdistill.runs.history import History
from matchdistill.runs.loggers import new_loggers
from matchdistill.runs.looking import look
from matchdistill.runs.machine import check_compiler, is_first, machine_trainer, quieten
from matchdistill.runs.metrics import METRICS, RunMetrics, read_metrics, write_metrics
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import CELLS, CHECKPOINT, WEIGHTS, AtomicCheckpoints, check_folder, claim, save_student
from matchdistill.runs.telling import Narration, TrainingBar
from matchdistill.runs.throughput import Throughput
from matchdistill.runs.training import FAMILY, SGD, seconds_of
from matchdistill.runs.weak import TeacherCheck
from matchdistill.tasks.module import DistilledModule


def fit(recipe: Recipe, out: Path, resume: bool = False, quiet: bool = False) -> RunMetrics:
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
        ValueError: `out` already holds a run and `resume` is not set, or holds another recipe's, or another process writes
            there; a model or data that does not fit.
        FloatingPointError: a loss that is not finite.
        KeyboardInterrupt, Terminated: it was told to end, by Ctrl-C or SIGTERM.
        OutOfTime: it has reached `training.max_time` and can be resumed.
    """
    first = is_first(recipe.trainer)
    with ending.orderly():
        if first and (out / METRICS).is_file() and (out / REPORT).is_file() and not (out / LOCK).exists():
            check_folder(recipe, out, resume, other=CELLS)
            if done := read_metrics(out):
                return done  # nothing is written
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


def _train(recipe: Recipe, out: Path, resume: bool, quiet: bool) -> RunMetrics:
    """The run itself, in a folder that is this process's."""
    started = time.monotonic()
    first = is_first(recipe.trainer)
    terminal = console(quiet=quiet or not first)
    quieten()
    data = recipe.data
    module = build_module(recipe)
    teacher = module.teacher
    teacher_recipe = recipe.for_teacher() if teacher is not None and recipe.teacher.training.epochs else None
    history = History(out, data, started)
    best, stop, limit = _judges(recipe, module, out, started)
    speed = Throughput(out)
    judges = [each for each in (best, stop, limit) if each is not None]
    trainer = _trainer(recipe, out, terminal, [history, *judges], speed) if module.learns else _measuring(recipe)
    if recipe.trainer.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm needs GPUs: several processes on the CPU train without it")
    if recipe.trainer.compile:
        check_compiler(trainer.strategy.root_device)
    if recipe.teacher.engine != "torch" and (place := trainer.strategy.root_device.type) != "cpu":
        raise ValueError(
            f"teacher.engine {recipe.teacher.engine} runs on the CPU, but this run is on {place}: give "
            "--trainer.accelerator cpu, or let torch run the teacher"
        )
    for images in (data, *([teacher_recipe.data] if teacher_recipe is not None else [])):
        images.check_shares(trainer.world_size)
    module.check_processes(trainer.world_size)
    check, weak = TeacherCheck(recipe, module, out), None
    if teacher_recipe is None:
        weak = check.found(trainer.strategy.root_device)
    # Only now: a recipe with a mistake leaves nothing behind, and nothing was trained for it.
    if first:
        claim(recipe, out)
    trainer.loggers = new_loggers(recipe.trainer.loggers, out)
    seconds = 0.0
    if teacher is not None and teacher_recipe is not None:
        begun = time.monotonic()
        seconds = _train_teacher(teacher, teacher_recipe, data, out, resume, quiet).seconds
        history.started += time.monotonic() - begun
        weak = check.found(trainer.strategy.root_device)
    if first:
        attempt("keep what the teacher came to", check.keep)
    for line in itertools.chain([f"warning: {weak}"] if weak else [], _choices(recipe, module, check.applies)):
        terminal.print(line, highlight=False, soft_wrap=True)
    _steps(trainer, module, data, out)
    if limit is not None and limit.epochs is not None:
        raise ending.OutOfTime(f"training.max_time {recipe.training.max_time} {limit}")
    for each in (stop, best, speed):
        if each is not None and str(each):
            terminal.print(str(each), highlight=False, soft_wrap=True)
    metrics = _metrics(recipe, module, trainer, stop, seconds + history.seconds)
    if trainer.is_global_zero:
        save_student(module.network(), recipe, out)
        look(module, data, out, trainer.strategy.root_device)
        write_metrics(out, metrics)  # last: what has metrics is finished, but for its page
        attempt("write the page", lambda: write_report([out]))
    trainer.strategy.barrier()
    return metrics


def _train_teacher(
    teacher: nn.Module, recipe: Recipe, data: DataModule, out: Path, resume: bool, quiet: bool
) -> RunMetrics:
    """Train a teacher by its own recipe, in a folder of the student's run, and give it its weights."""
    if is_first(recipe.trainer) and read_metrics(out / "teacher") is None:
        look_at(data)
    terminal = console(quiet=quiet or not is_first(recipe.trainer))
    name, epochs = recipe.student.name, recipe.training.all_epochs
    terminal.print(f"first the teacher: {name}, {epochs} epoch{'s' * (epochs > 1)}", highlight=False, soft_wrap=True)
    result = fit(recipe, out / "teacher", resume, quiet)
    load_weights(teacher, out / "teacher" / WEIGHTS)
    shown = "".join(f": {metric.label} {metric.shown(result.student[metric.name])}" for metric in result.measured[:1])
    terminal.print(f"the teacher is trained{shown}; now the student", highlight=False, soft_wrap=True)
    return result


def _metrics(
    recipe: Recipe, module: DistilledModule, trainer: pl.Trainer, stop: EarlyStop | None, seconds: float
) -> RunMetrics:
    """What a run came to that has just ended."""
    return RunMetrics(
        task=recipe.task,
        method=recipe.distillation.method,
        seed=recipe.seed,
        epochs=(stop and stop.epochs) or (trainer.current_epoch if trainer.should_stop else trainer.max_epochs or 0),
        student=module.result,
        teacher=module.teacher_result,
        parameters={"student": _parameters(module.network()), "teacher": _parameters(module.teacher)},
        corrupt_images=_of_all_ranks(recipe.data.corrupt),
        seconds=round(seconds, 1),
    )


def _choices(recipe: Recipe, module: DistilledModule, measured: bool) -> Iterator[str]:
    """What was chosen where the recipe gives nothing, in lines for the terminal; whether the teacher was measured."""
    untrained = recipe.teacher.weights is None and not recipe.teacher.training.epochs
    if module.teacher is not None and untrained and not measured:
        yield (
            "the teacher has no weights and is not trained, so it teaches what is random unless its function loads weights "
            "itself (teacher.weights, teacher.training.epochs)"
        )
    images, batch = len(recipe.data.train_set), recipe.data.options.batch_size
    if module.learns and images > batch and (left := images % batch):
        yield f"{left} of {images} images fill no batch of {batch} and are left out, others in each epoch (data.batch_size)"
    settings, every = recipe.distillation, recipe.distillation.epochs_between(images)
    family, by_epochs = settings.parsed.family, settings.refresh_steps is None
    if settings.refresh_every == "auto" and every != 1 and by_epochs and family is not None and family.refreshes:
        yield f"the matching is refreshed every {every} epochs, so that it takes little time (distillation.refresh_every)"
    if recipe.trainer.channels_last and module.memory_format is not torch.channels_last:
        yield (
            "trainer.channels_last is left out: strided 1x1 convolutions of fewer than 8 channels, as the student has, may "
            "crash on some CPUs in that order"
        )
    seen, wanted = recipe.data.preparation, recipe.teacher.prepared
    if recipe.student.preparation is not None and not seen.usual:
        shown = dataclasses.replace(seen, size=None) if recipe.config["data"].get("image_size") else seen
        yield f"images as {recipe.student.name} wants them: {shown} (student.preparation)"
    if module.teacher is not None and (seen.mean, seen.std) != (wanted.mean, wanted.std):
        yield f"the teacher sees the same images by {wanted.normalised} (teacher.preparation)"
    if module.teacher is not None and wanted.size not in (None, seen.size):
        yield f"the teacher sees the same images resized to {wanted.size} px (teacher.preparation)"
    if recipe.training.left_to_family and (chosen := module.schedule).optimizer != SGD:
        yield (
            f"{recipe.student.name} is a transformer: {chosen.optimizer}, learning rate {chosen.lr}, weight decay "
            f"{chosen.weight_decay}, {chosen.schedule} (give {', '.join(f'training.{name}' for name in FAMILY)} for others)"
        )
    if module.cache is not None:
        yield str(module.cache)
    if module.distiller is not None:
        yield str(module.distiller)


def _judges(
    recipe: Recipe, module: DistilledModule, out: Path, started: float
) -> tuple[BestStudent | None, EarlyStop | None, TimeLimit | None]:
    """What decides, where the recipe says so, which student is the best and whether a run ends before its last epoch."""
    metric, training = next(iter(module.metrics), None), recipe.training
    best = BestStudent(out, metric) if metric is not None and training.keep_best else None
    stop = EarlyStop(metric, training.stop_after) if metric is not None and training.stop_after is not None else None
    seconds = seconds_of(training.max_time or "")
    return best, stop, TimeLimit(seconds, started) if seconds else None


def _steps(trainer: pl.Trainer, module: DistilledModule, data: DataModule, out: Path) -> None:
    """All epochs, or those that the checkpoint leaves to do; of a module that does not learn a validation alone."""
    if not module.learns:
        trainer.validate(module, data, verbose=False)
        if trainer.is_global_zero:
            attempt("keep the environment", lambda: keep_environment(module, out))
        return
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


def look_at(data: DataModule) -> None:
    """See that the first batches can be read, before a teacher is trained for hours."""
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with contextlib.closing(cast("Generator[Any]", iter(loader))) as batches:  # which ends its workers
            next(batches, None)


def _trainer(recipe: Recipe, out: Path, terminal: Console, memory: list[Callback], last: Callback) -> pl.Trainer:
    """The trainer of a run, with the callbacks whose memory is in the checkpoint, one of them after all others."""
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
        *memory,  # before the average, which leaves the student at the end of a validation
        *own_callbacks(machine.callbacks),
        Signals(),
        checkpoints,
    ]
    if recipe.training.ema is not None:
        callbacks.append(WeightAverage(recipe.training.ema))
    if machine.compile:
        callbacks.append(Compilation())
    if on_terminal:
        callbacks.append(TrainingBar(terminal))
    callbacks.append(last)
    return machine_trainer(
        machine,
        max_epochs=recipe.training.all_epochs,
        gradient_clip_val=recipe.training.clip_grad_norm,
        accumulate_grad_batches=recipe.training.accumulate,
        log_every_n_steps=machine.log_every,
        callbacks=callbacks,
        logger=False,
        plugins=[AtomicCheckpoints()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
    )


def _measuring(recipe: Recipe) -> pl.Trainer:
    """The trainer of a run in which nothing is learned."""
    return machine_trainer(recipe.trainer, max_epochs=0, logger=False, enable_progress_bar=False)


def _of_all_ranks(names: list[str]) -> list[str]:
    """What the processes of a run have found, together."""
    found: list[list[str]] = [names]
    if dist.is_available() and dist.is_initialized():
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, names)
    return sorted(set().union(*found))


def _parameters(model: nn.Module | None) -> int | None:
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())

"""How good a run's networks are on the validation images."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path

from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from matchdistill.messages import cause
from matchdistill.models import load_weights
from matchdistill.models.trust import check_trusted, check_trusted_data
from matchdistill.runs.build import build_distiller, build_teacher, first_teacher
from matchdistill.runs.machine import machine_trainer, quieten
from matchdistill.runs.places import code_of
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import CHECKPOINT, WEIGHTS, AtomicCheckpoints
from matchdistill.tasks import TASKS
from matchdistill.tasks.module import DistilledModule

PROGRAMS = (".onnx", ".pt2")  # what exported programs end in


def validate(
    recipe: Recipe, run: Path, weights: Path | None = None, trust: bool = False
) -> dict[str, dict[str, float]]:
    """Measure the student of a run, and its teacher where its weights are there, or follow from the seed.

    Args:
        recipe: of the run.
        run: its folder.
        weights: what the student is loaded from, a checkpoint or exported weights, or its exported program (.onnx, .pt2);
            None: its final weights.
        trust: build networks and read images by whatever functions the recipe names, and load `.pt2` files, which can
            run code.

    Returns:
        The task's metrics of "student" and "teacher", by name.

    Raises:
        ValueError: weights that are missing or do not fit, or a package that is missing for them; or something that would
            run code that is not trusted.
    """
    quieten()
    if not trust:
        check_trusted(run, *((network.name, network.options) for network in (recipe.student, recipe.teacher)))
        check_trusted_data(run, recipe.data.code)
        if weights is not None and weights.suffix.lower() == ".pt2":
            raise ValueError(f"{weights}: torch.export can run code that is in a file: give --trust if it is your own")
    with code_of(run) if trust else contextlib.nullcontext():
        return _measured(recipe, run, weights)


def _measured(recipe: Recipe, run: Path, weights: Path | None) -> dict[str, dict[str, float]]:
    """The metrics of a run that may be looked at."""
    task, data = TASKS[recipe.task], recipe.data
    data.setup()
    if weights is not None and weights.suffix.lower() in PROGRAMS:
        student = task.load_exported(weights, data)
    else:
        plain = dataclasses.replace(recipe.student, weights=None, options=task.bare(recipe.student.options))
        student = task.build(plain, data.num_classes)
        load_weights(student, weights or run / WEIGHTS)
        task.check(student, data, "student")
    teacher = _teacher(recipe, run / "teacher" / WEIGHTS)
    distiller = None
    if teacher is not None and task.measures_loss(data) and recipe.distillation.parsed.family is not None:
        if (run / CHECKPOINT).is_file():
            distiller = build_distiller(recipe, teacher, student)
        else:
            warnings.warn(
                f"the loss of features is not measured: it takes {run / CHECKPOINT}, which is gone", stacklevel=2
            )
    module = task.module(recipe, data, student, teacher, distiller)
    if module.measured_with:
        _restore(module, run / CHECKPOINT)
    trainer = machine_trainer(recipe.trainer, logger=False, enable_progress_bar=False)
    trainer.validate(module, data, verbose=False)
    return {"student": module.result, "teacher": module.teacher_result}


def _restore(module: DistilledModule, checkpoint: Path) -> None:
    """Load from a checkpoint what a student is measured with.

    Raises:
        ValueError: it is missing or damaged, or of another run.
    """
    state = AtomicCheckpoints().load_checkpoint(checkpoint)["state_dict"]
    rest = {name: value for name, value in state.items() if name.startswith(module.measured_with)}
    try:
        lacking, strange = module.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit this run ({cause(error)})") from error
    if strange:
        raise ValueError(f"{checkpoint} does not fit this run: there is no place for {', '.join(strange[:3])}")
    if left := [name for name in lacking if name.startswith(module.measured_with)]:
        raise ValueError(f"{checkpoint} does not fit this run: it lacks {', '.join(left)}")


def _teacher(recipe: Recipe, trained: Path) -> nn.Module | None:
    """The teacher as the run had it; None if it had none, or would have to train it first."""
    teacher = recipe.teacher
    if teacher.name is None or (teacher.training.epochs and not trained.is_file()):
        return None
    if teacher.training.epochs or teacher.weights is not None:
        return build_teacher(recipe, trained if teacher.training.epochs else teacher.weights)
    with isolate_rng():  # its random weights follow from the run's seed
        return first_teacher(recipe)

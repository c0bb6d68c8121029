"""Networks that start from the student of another run, which may be of another task and other classes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from matchdistill.files import path_of
from matchdistill.messages import listed
from matchdistill.models import load_weights, weights_file
from matchdistill.runs.settings import Model
from matchdistill.runs.store import describe_student
from matchdistill.tasks import TASKS
from matchdistill.tasks.task import Task


def run_in(weights: str | None) -> Path | None:
    """The folder of the run that weights are; None if they are anything else.

    Raises:
        ValueError: there is no such file or package.
    """
    if weights is None or weights_file(weights) is None:
        return None
    return folder if (folder := path_of(weights)).is_dir() else None


def load_from_run(
    network: nn.Module, named: Model, run: Path, task: Task, class_names: Sequence[str], head: bool = False
) -> None:
    """Load the student of a run into the same network, its best one if the run kept it.

    Where the run had other classes, the head stays as it is, with a warning: the entries that the number of classes decides
    about.

    Args:
        network: for the classes.
        named: its name and options, and the folder as its weights.
        run: the folder.
        task: the task of the network.
        class_names: of its classes.
        head: whether the head must be loaded too.

    Raises:
        ValueError: the folder holds no finished run, its student is another network, or it has no such head.
    """
    described = describe_student(run, trust=True)  # the recipe names the same function
    known = TASKS[described["task"]]
    options = known.bare(named.options)
    if described["name"] != named.name:
        raise ValueError(f"weights {run}: its student is {described['name']}, not {named.name}: give the same network")
    if described["options"] != options:
        raise ValueError(
            f"weights {run}: its student has the options {described['options']}, not {options}: give the same, or name the "
            f"file {weights_file(str(run))} if it fits all the same"
        )
    plain = dataclasses.replace(named, weights=None)
    own = network.state_dict()
    with torch.random.fork_rng(devices=[]):  # so that the file of the run instead of its folder gives the same run
        source = known.build(plain, described["num_classes"])
        load_weights(source, weights_file(str(run)) or run)
        state, untrained = source.state_dict(), set[str]()
        if described["class_names"] != list(class_names):
            other = task.build(plain, len(class_names) + 1, [*class_names, ""]).state_dict()
            untrained = {key for key, value in own.items() if key not in other or other[key].shape != value.shape}
    lacking = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    untrained.update(lacking)
    if untrained and head:
        raise ValueError(
            f"weights {run}: its student has no head for these classes, and a head that nobody trains teaches nothing: "
            "train it (teacher.training.epochs), or choose a method without kd"
        )
    network.load_state_dict({key: state[key] for key in own if key not in untrained}, strict=False)
    if untrained:
        ordered = [key for key in own if key in untrained]
        had = "other classes" if described["class_names"] else "no classes"
        warnings.warn(
            f"the student of {run} had {had}: what depends on them starts untrained ({listed(ordered)})", stacklevel=3
        )

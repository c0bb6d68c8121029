"""What lies in the folder of a run, finished or not, and in that of a comparison."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from matchdistill.files import open_file, read_json
from matchdistill.messages import cause
from matchdistill.methods import parse_method
from matchdistill.runs import evidence
from matchdistill.runs.best import BEST_VALUES, best_in_words
from matchdistill.runs.metrics import METRICS, RunMetrics, read_metrics
from matchdistill.runs.recipe import read_recipe, task_of
from matchdistill.runs.store import CELLS, RECIPE
from matchdistill.runs.summary import ALONE
from matchdistill.runs.throughput import THROUGHPUT, speed_in_words
from matchdistill.tasks import TASKS
from matchdistill.tasks.judging import Judged
from matchdistill.tasks.metric import Metric, metrics_in
from matchdistill.tasks.task import Task


class Point(NamedTuple):
    """A logged value."""

    step: int
    epoch: int
    value: float


@dataclass(frozen=True)
class Examined:
    """What a run's networks made of the validation images.

    Attributes:
        images: how many the set has.
        index: numbers (N,) of the ones that were looked at.
        classes: names of the classes.
        roles: what the "student" and the "teacher" made of them.
    """

    images: int
    index: Tensor
    classes: list[str]
    roles: dict[str, Judged]


Seen = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Run:
    """A run as far as it has come.

    Attributes:
        folder: where it is.
        name: what tells it from the others of a page.
        recipe: its values.
        metrics: None as long as it is not finished.
    """

    folder: Path
    name: str
    recipe: dict[str, Any] = field(repr=False)
    metrics: RunMetrics | None = field(repr=False)

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> Run:
        """The run in a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it has no {RECIPE}")
        run = cls(folder, name or folder.resolve().name, read_recipe(folder / RECIPE), read_metrics(folder))
        if name is None and run._grid:
            run.name = f"{folder.resolve().parent.name}, {run.name.replace('seed', 'seed ')}"
        return run

    @property
    def method(self) -> str:
        """The method of distillation."""
        return str((self.recipe.get("distillation") or {}).get("method", "none"))

    @property
    def task(self) -> Task:
        """Its task."""
        return TASKS[task_of(self.recipe)]

    @property
    def learned(self) -> str:
        """What the student learns from, for a sentence that begins with what it does."""
        return parse_method(self.method).learned_beside(TASKS[task_of(self.recipe)].learns_from)

    @property
    def comparing(self) -> Metric | None:
        """The metric that runs are compared by: of its task's the first that it has; None: nothing is measured."""
        task = TASKS[task_of(self.recipe)]
        names = self.metrics.student if self.metrics else [name.removeprefix("val/") for name in self.curves]
        return next(iter([*metrics_in(task.comparable, names), *task.comparable]), None)

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """What was logged by epoch, by name; as long as there is no epoch, by step.

        Of steps that were taken twice, as the run had been cut, the later ones.

        Raises:
            ValueError: a file is damaged.
        """
        by_epoch: dict[str, list[Point]] = {}
        by_step: dict[str, list[Point]] = {}
        for each in evidence.read_epochs(self.folder):
            for name, value in each.items():
                if name not in ("epoch", "step") and value is not None:
                    by_epoch.setdefault(name, []).append(Point(each["step"] - 1, each["epoch"], value))
        if by_epoch:
            return by_epoch
        # Of a run within its first epoch.
        versions = [path for path in (self.folder / "logs").glob("version_*/metrics.csv") if _version(path) >= 0]
        for path in sorted(versions, key=_version):
            try:
                _read_log(path, by_epoch, by_step)
            except (ValueError, csv.Error) as error:
                raise ValueError(
                    f"{path} is damaged ({cause(error)}): remove it, the page can do without it"
                ) from error
        return by_epoch if "train/loss" in by_epoch else {**by_epoch, **by_step}

    @cached_property
    def refreshes(self) -> list[dict[str, Any]]:
        """As of `evidence.read_refreshes`."""
        return evidence.read_refreshes(self.folder)

    @cached_property
    def matchings(self) -> dict[str, Seen]:
        """The matchings "first", "last" and "final", the latter with the trained student's costs, as far as they are."""
        places = {"first": evidence.FIRST, "last": evidence.LAST, "final": evidence.FINAL}
        found = {name: evidence.load(self.folder / place) for name, place in places.items()}
        return {name: seen for name, seen in found.items() if seen is not None}

    @property
    def moments(self) -> list[str]:
        """The matchings that are shown side by side: the first, and the final one or, before there is one, the last."""
        return [name for name in ("first", "final" if "final" in self.matchings else "last") if name in self.matchings]

    @property
    def positions(self) -> list[dict[str, Any]]:
        """What is known of each position."""
        return list(self.matchings[self.moments[-1]][1]["positions"]) if self.moments else []

    @cached_property
    def pictures(self) -> Seen | None:
        """As of `evidence.look`."""
        return evidence.load(self.folder / evidence.PICTURES)

    @cached_property
    def examined(self) -> Examined | None:
        """What its networks made of the validation images; None of a run of an earlier version."""
        if (found := evidence.load(self.folder / evidence.JUDGED)) is None:
            return None
        tensors, told = found
        roles: dict[str, Judged] = {}
        for role, words in told["roles"].items():
            own: dict[str, Any] = {
                name.removesuffix(f" {role}"): each for name, each in tensors.items() if name.endswith(f" {role}")
            }
            roles[role] = Judged(**words, **own)
        return Examined(told["images"], tensors["index"], told["classes"], roles)

    @cached_property
    def contested(self) -> dict[int, dict[str, Any]]:
        """What is known of the images that its student and its teacher differ in, by number, with the "place" of each."""
        found = evidence.load(self.folder / evidence.CONTESTED)
        self.contested_tensors = None if found is None else found[0]
        images = [] if found is None else found[1]["images"]
        return {each["number"]: {**each, "place": place} for place, each in enumerate(images)}

    contested_tensors: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def layers(self) -> list[str]:
        """What each position is called: the student's layer, with the teacher's where one layer has several."""
        students = [str(each["student"]) for each in self.positions]
        return [
            f"{each['teacher']} → {name}" if students.count(name) > 1 else name
            for each, name in zip(self.positions, students, strict=True)
        ]

    def layer(self, number: int) -> str:
        """What a position is called; its number before the first refresh."""
        return self.layers[number] if number < len(self.positions) else f"position {number}"

    @cached_property
    def costs(self) -> dict[str, Any]:
        """Operations and latency of "student" and "teacher", and "memory"."""
        return self._json(evidence.COSTS)

    @property
    def notes(self) -> list[str]:
        """Lines about the best student, if it is kept, and about how fast the student was trained."""
        best, speed, metric = self._json(BEST_VALUES), self.costs.get(THROUGHPUT), self.comparing
        lines = [best_in_words(metric, best)] if best and metric is not None else []
        return lines if speed is None else [*lines, speed_in_words(speed)]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, versions and machine."""
        return self._json(evidence.ENVIRONMENT)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def teacher(self) -> Run | None:
        """The run that trained its teacher, beside it in a comparison."""
        if self.method == "none":
            return None
        places = [self.folder / "teacher", *([self._grid / "teacher"] if self._grid else [])]
        return next((Run.of(folder) for folder in places if (folder / RECIPE).is_file()), None)

    @property
    def seconds(self) -> float | None:
        """How long it took, without its teacher's training; None as long as it is not finished."""
        if self.metrics is None:
            return None
        teacher = self.teacher
        inside = teacher is not None and teacher.folder == self.folder / "teacher" and teacher.metrics
        return self.metrics.seconds - (inside.seconds if inside else 0.0)

    @cached_property
    def alone(self) -> Run | None:
        """The run of the same seed without a teacher: beside this one, or in the same comparison."""
        if self.method == "none":
            return None
        places = [self.folder / ALONE]
        places += [self._grid / CELLS / "none" / self.folder.resolve().name] if self._grid else []
        return next((Run.of(folder) for folder in places if (folder / METRICS).is_file()), None)

    @property
    def comparison(self) -> str | None:
        """The address of the page of its comparison, from its own; None: it is no run of one."""
        return None if self._grid is None else "../../../report.html"

    @property
    def _grid(self) -> Path | None:
        """The folder of the comparison that it is a run of."""
        parents = self.folder.resolve().parents
        return parents[2] if len(parents) > 2 and parents[1].name == CELLS else None


def _version(path: Path) -> int:
    """The number of a log; -1 of anything else."""
    number = path.parent.name.partition("_")[2]
    return int(number) if number.isdecimal() else -1


def _read_log(path: Path, by_epoch: dict[str, list[Point]], by_step: dict[str, list[Point]]) -> None:
    """Add the values of a log, of which there may be millions, to those of earlier ones, in place of what came after it."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        if not {"step", "epoch"} <= set(names):
            return
        at_step, at_epoch = names.index("step"), names.index("epoch")
        # A loss is logged by step and by epoch, under names that say so.
        columns = [
            (place, name.removesuffix("_step"), by_step if name.endswith("_step") else by_epoch)
            for place, name in enumerate(names)
            if place not in (at_step, at_epoch)
        ]
        begun = False
        for row in rows:
            if len(row) < len(names) or not row[at_step]:
                continue
            step, epoch = int(row[at_step]), int(row[at_epoch])
            if not begun:
                begun = True
                for known in (by_epoch, by_step):
                    for name, points in known.items():
                        known[name] = [point for point in points if point.step < step]
            by_epochs = "train/loss" in by_epoch
            for place, name, into in columns:
                if row[place] and not (by_epochs and into is by_step):
                    into.setdefault(name, []).append(Point(step, epoch, float(row[place])))


def cells(folder: Path) -> list[Run]:
    """The runs of a comparison so far, by method as in its recipe, then by seed.

    Raises:
        ValueError: there are none.
    """
    recipe = read_recipe(folder / RECIPE)
    methods = (recipe.get("compare") or {}).get("methods", [])
    found = [Run.of(path.parent) for path in (folder / CELLS).glob(f"*/seed*/{RECIPE}")]
    if not found:
        raise ValueError(f"{folder} is the folder of a comparison without a run so far")

    def place(run: Run) -> tuple[int, str, int]:
        known = methods.index(run.method) if run.method in methods else len(methods)
        return known, run.method, int(run.recipe.get("seed", 0))

    return sorted(found, key=place)

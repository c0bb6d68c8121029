"""What a finished run came to: the file ``metrics.json`` in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matchdistill.files import read_json, write_json
from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric, metrics_in
from matchdistill.tasks.task import Task

METRICS = "metrics.json"
SCHEMA = 2  # of this file, and of that of a comparison


@dataclass(frozen=True)
class RunMetrics:
    """What a finished run came to.

    Attributes:
        task: its task.
        method: how the student was distilled.
        seed: of everything random.
        epochs: that the student was trained for.
        student: its metrics by name, each a share from 0 to 1 or what the task's `Metric` says.
        teacher: the teacher's, empty where there is none.
        parameters: how many "student" and "teacher" have; None: there is none.
        corrupt_images: paths of images that could not be read and were skipped.
        seconds: that it took, with its teacher's training.
    """

    task: str
    method: str
    seed: int
    epochs: int
    student: dict[str, float]
    teacher: dict[str, float]
    parameters: dict[str, int | None]
    corrupt_images: list[str]
    seconds: float

    def of(self, role: str) -> dict[str, float]:
        """The metrics of the "student" or the "teacher"."""
        return self.student if role == "student" else self.teacher

    @property
    def measured(self) -> list[Metric]:
        """What was measured of the student, in the order of its task."""
        return metrics_in(TASKS[self.task].metrics, self.student)

    def plain(self) -> dict[str, Any]:
        """As the file has it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> RunMetrics:
        """From what the file has."""
        return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def comparing(runs: Sequence[RunMetrics]) -> Metric | None:
    """The metric that runs of one task are compared by, the first that all have; None: there is none, or no run."""
    shared = set.intersection(*(set(run.student) for run in runs)) if runs else set()
    return next(iter(metrics_in(TASKS[runs[0].task].comparable, shared)), None) if runs else None


def write_metrics(out: Path, metrics: RunMetrics) -> None:
    """Write the file into a folder."""
    write_json(out / METRICS, metrics.plain())


def read_metrics(out: Path) -> RunMetrics | None:
    """The metrics of a finished run, None of any other folder.

    Raises:
        ValueError: the file is damaged, of another version, or holds anything else.
    """
    path = out / METRICS
    if not path.is_file():
        return None
    check_schema(out)
    found = read_json(
        path,
        task=str,
        method=str,
        seed=int,
        epochs=int,
        student=dict[str, float],
        teacher=dict[str, float],
        parameters={"student": int, "teacher": int | None},
        corrupt_images=list[str],
        seconds=float,
    )
    task = TASKS.get(found["task"])
    if task is None:
        raise ValueError(
            f"{path} is of the task {found['task']!r}, which is not known here: expected {', '.join(TASKS)}"
        )
    if _lacks(task, found):
        raise ValueError(f"{path} is damaged: it lacks metrics of the student or parameters of the teacher")
    return RunMetrics.of_plain(found)


def _lacks(task: Task, found: dict[str, Any]) -> bool:
    student_lacks = bool(task.comparable) and not metrics_in(task.comparable, found["student"])
    return student_lacks or bool(found["teacher"] and found["parameters"]["teacher"] is None)


def check_schema(out: Path) -> None:
    """Raise a ValueError if a finished run or comparison in a folder is of another version."""
    path = out / METRICS
    if not path.is_file():
        return
    schema = read_json(path).get("schema")
    if schema != SCHEMA:
        kind = "without a schema" if schema is None else f"of schema {schema!r}"
        raise ValueError(
            f"{path} is {kind}, this version of matchdistill reads schema {SCHEMA}: look at it with the version that wrote "
            "it, or run it again in another folder"
        )

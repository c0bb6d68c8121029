"""Records of runs and their settings, without what a test does not look at; and the values of a tiny recipe."""

import dataclasses
from typing import Any

from matchdistill.runs.metrics import RunMetrics
from matchdistill.runs.settings import Comparison, Distillation, Machine, Model, Settings, Teacher, Training

TINY: dict[str, Any] = {
    "data": {"batch_size": 20, "train_limit": 60, "val_limit": 50},
    "teacher": {"name": "matchdistill.models:small_resnet", "options": {"width": 4}},
    "student": {"name": "matchdistill.models:small_resnet", "options": {"width": 2}},
    "training": {"epochs": 2, "lr": 0.05, "schedule": "cosine"},
    "distillation": {"refresh_every": 2},
    "trainer": {"accelerator": "cpu", "log_every": 1},
    "compare": {"methods": ["none", "kd"], "seeds": 2},
}


def settings(training=None, **distillation):
    """The settings of a run."""
    return Settings(
        task="classification",
        seed=0,
        teacher=Teacher(),
        student=Model(),
        training=training or Training(),
        distillation=Distillation(**distillation),
        trainer=Machine("cpu"),
        compare=Comparison(methods=["none"]),
    )


def run_of(method="none", seed=0, student=None, teacher=None, seconds=1.0, task="classification"):
    """What a run came to."""
    student = {"top1": 0.5} if student is None else student
    return RunMetrics(task, method, seed, 1, student, teacher or {}, {"student": 1, "teacher": 2}, [], seconds)


def runs_of(accuracies, teacher=0.95):
    """Runs of methods by name, with an accuracy by seed."""
    return [
        run_of(method, seed, {"top1": value}, known, 2.0 + seed)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
        for known in [{} if method == "none" else {"top1": teacher}]
    ]


def timeless(records):
    """Records but for the seconds that they took."""
    return [dataclasses.replace(record, seconds=0.0) for record in records]

"""Runs of several methods and seeds in numbers: means, intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from matchdistill.runs.metrics import RunMetrics, comparing
from matchdistill.tasks.metric import Metric


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        interval: half the width of Student's 95% interval; None for a single seed.
    """

    mean: float
    interval: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of values, one by seed."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, None)
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        return cls(mean, float(half))

    def shown(self, metric: Metric, sign: str = "") -> str:
        """With half of its interval, in the metric's unit: percent for shares."""
        places = ".2f" if metric.share else ".4g"
        interval = "" if self.interval is None else f" ± {metric.scale * self.interval:{places}}"
        return f"{metric.scale * self.mean:{sign}{places}}{interval}"


@dataclass(frozen=True)
class Entry:
    """What a method came to over its seeds.

    Attributes:
        method: its name.
        seeds: of its runs.
        value: of the metric; None where nothing is measured.
        difference: to the base method, in the same seeds; None for the base itself, and if the base lacks a seed.
        gap_recovered: the share of the distance from the base to the teacher that the mean difference covers; None if the
            teacher is no better.
        seconds: of a run, on average.
    """

    method: str
    seeds: list[int]
    value: Mean | None
    difference: Mean | None
    gap_recovered: float | None
    seconds: float

    def cells(self, metric: Metric) -> list[str]:
        """Value, difference and share of the gap for a table, empty where there is none."""
        gap = self.gap_recovered
        return [
            "" if self.value is None else self.value.shown(metric),
            "" if self.difference is None else self.difference.shown(metric, "+"),
            "" if gap is None else f"{gap:.0%}",
        ]

    def plain(self, metric: Metric | None) -> dict[str, Any]:
        """As files have it: the value under the metric's name."""
        plain = asdict(self)
        value = plain.pop("value")
        return plain if metric is None else {metric.name: value, **plain}


def summarise(
    runs: Sequence[RunMetrics], methods: Sequence[str], base: str = "none", metric: Metric | None = None
) -> list[Entry]:
    """Mean and 95% interval by method, paired by seed with the runs of a method to compare with.

    Args:
        runs: of one task.
        methods: in the order of the result.
        base: the method to compare with.
        metric: what to compare by; None: the one of the runs' task.
    """
    metric = metric or comparing(runs)
    return [_entry([run for run in runs if run.method == method], method, runs, base, metric) for method in methods]


def _entry(
    own: Sequence[RunMetrics], method: str, runs: Sequence[RunMetrics], base: str, metric: Metric | None
) -> Entry:
    seeds = sorted(run.seed for run in own)
    seconds = float(np.mean([run.seconds for run in own]))
    if metric is None:
        return Entry(method, seeds, None, None, None, seconds)
    values = {(run.method, run.seed): run.student[metric.name] for run in runs}
    value = Mean.of([values[method, seed] for seed in seeds])
    if method == base or not all((base, seed) in values for seed in seeds):
        return Entry(method, seeds, value, None, None, seconds)
    difference = Mean.of([values[method, seed] - values[base, seed] for seed in seeds])
    alone = float(np.mean([values[base, seed] for seed in seeds]))
    teacher = teacher_value(runs, metric)
    gap = None if teacher is None else metric.gap_recovered(alone, alone + difference.mean, teacher)
    return Entry(method, seeds, value, difference, gap, seconds)


def teacher_value(runs: Sequence[RunMetrics], metric: Metric) -> float | None:
    """A metric of the runs' teacher; None where none was measured."""
    return next((run.teacher[metric.name] for run in runs if metric.name in run.teacher), None)

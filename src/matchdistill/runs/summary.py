"""Runs of several methods and seeds in numbers: means, intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from matchdistill.runs.metrics import RunMetrics, comparing, read_metrics
from matchdistill.tasks.metric import Metric

FEWEST = 3  # seeds below which nothing is concluded
MOST = 1000  # seeds that nobody runs
ALONE = "alone"  # folder, in that of a run, of the run that trains its student alone


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

    def tells(self, seeds: int) -> bool:
        """Whether a difference over so many seeds can be told: they are at least `FEWEST`, the interval leaves zero out."""
        return seeds >= FEWEST and self.interval is not None and abs(self.mean) > self.interval

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
        """Value, difference and share of the gap for a table, empty where there is none; no share of what is not told."""
        gap = self.gap_recovered
        return [
            "" if self.value is None else self.value.shown(metric),
            "" if self.difference is None else self.difference.shown(metric, "+"),
            ""
            if gap is None or self.difference is None or not self.difference.tells(len(self.seeds))
            else f"{gap:.0%}",
        ]

    def conclusion(self, metric: Metric) -> str | None:
        """What the difference tells, in words; None where there is none."""
        return None if self.difference is None else conclusion(self.difference, len(self.seeds), metric)

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


def seeds_needed(difference: Mean, seeds: int) -> int | None:
    """The least number of seeds whose interval would leave zero out, if mean and deviation stay as they are.

    Args:
        difference: paired by seed.
        seeds: that it was found with.

    Returns:
        At least `FEWEST`; None for a single seed, and where it is more than `MOST`.

    Examples:
        >>> seeds_needed(Mean.of([0.01, 0.03, -0.01, 0.02]), 4)
        10
    """
    if seeds < 2 or difference.interval is None:
        return None
    deviation = difference.interval * seeds**0.5 / stats.t.ppf(0.975, seeds - 1)
    counts = np.arange(FEWEST, MOST + 1)
    enough = counts[stats.t.ppf(0.975, counts - 1) * deviation / counts**0.5 < abs(difference.mean)]
    return int(enough[0]) if len(enough) else None


def conclusion(difference: Mean, seeds: int, metric: Metric) -> str:
    """What a difference to the student alone tells, in words.

    Args:
        difference: paired by seed.
        seeds: that it was found with.
        metric: of it.

    Examples:
        >>> top1 = Metric("top1", "top-1")
        >>> conclusion(Mean.of([0.01, 0.03, -0.01, 0.02]), 4, top1)
        'no difference can be told; about 10 seeds would'
        >>> conclusion(Mean.of([0.02, 0.03, 0.02]), 3, top1)
        'better than without a teacher'
        >>> conclusion(Mean.of([0.02]), 1, top1)
        'one seed tells no difference; at least 3 would'
        >>> conclusion(Mean.of([0.0, 0.0, 0.0]), 3, top1)
        'the same in every seed'
    """
    if seeds < 2:
        return f"one seed tells no difference; at least {FEWEST} would"
    if difference.mean == 0 and difference.interval == 0:
        return "the same in every seed"
    if difference.tells(seeds):
        better = (difference.mean > 0) == metric.higher_is_better
        return f"{'better' if better else 'worse'} than without a teacher"
    needed = seeds_needed(difference, seeds)
    told = "two seeds tell no difference" if seeds < FEWEST else "no difference can be told"
    if needed is None:
        return f"{told}; more than {MOST} seeds would be needed"
    return f"{told}; about {needed} seeds would"


def read_alone(out: Path) -> RunMetrics | None:
    """The student of a run without its teacher, where it was trained beside the run; None: it is not known."""
    return read_metrics(out / ALONE)


def alone_in_words(run: RunMetrics, alone: RunMetrics | None, again: str) -> str:
    """How a distilled student compares with the same one without its teacher, in a line.

    Args:
        run: of the distilled student.
        alone: of the other one; None: it is not known.
        again: the command that would train it.
    """
    metric = comparing([run])
    if metric is None:
        return "student alone: this task measures nothing to compare it by"
    if alone is None or metric.name not in alone.student:
        return f"student alone: not known ({again} trains it)"
    before, after = alone.student[metric.name], run.student[metric.name]
    change = Mean(after - before, None)
    return (
        f"student alone: {metric.label} {metric.shown(before)}, distilled {metric.shown(after)}, "
        f"{change.shown(metric, '+')}: {conclusion(change, 1, metric)} (matchdistill compare)"
    )

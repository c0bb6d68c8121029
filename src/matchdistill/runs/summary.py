"""Runs of several methods and seeds in numbers: means, intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def metric_of(runs: Sequence[dict[str, Any]]) -> str:
    """The metric that runs are compared by, which comes first in theirs."""
    return str(next(iter(runs[0]["student"])))


def summarise(
    runs: Sequence[dict[str, Any]], methods: Sequence[str], base: str = "none", metric: str | None = None
) -> list[dict[str, Any]]:
    """Mean and 95% interval by method, paired by seed with the runs of a method to compare with.

    Args:
        runs: metrics of runs, each with "method", "seed", and those of "student" and "teacher" by name.
        methods: in the order of the result.
        base: the method to compare with.
        metric: what to compare by; None: the one that comes first in the runs, "top1" or "ap".

    Returns:
        For each method the metric, and "difference" as {"mean", "interval"}
        (half the width of Student's 95% interval, None for a single seed), the difference in the same seeds to `base` (None
        without it), and "gap_recovered": which share of the distance from `base` to the teacher the mean difference covers
        (None if it is not below).
    """
    metric = metric or metric_of(runs)
    accuracy = {(run["method"], run["seed"]): run["student"][metric] for run in runs}
    teacher = next((run["teacher"][metric] for run in runs if run["teacher"]), None)
    summary = []
    for method in methods:
        seeds = sorted(seed for name, seed in accuracy if name == method)
        entry: dict[str, Any] = {
            "method": method,
            "seeds": seeds,
            metric: _interval([accuracy[method, s] for s in seeds]),
        }
        entry |= {"difference": None, "gap_recovered": None}
        if method != base and all((base, seed) in accuracy for seed in seeds):
            entry["difference"] = _interval([accuracy[method, seed] - accuracy[base, seed] for seed in seeds])
            gap = None if teacher is None else teacher - float(np.mean([accuracy[base, seed] for seed in seeds]))
            entry["gap_recovered"] = entry["difference"]["mean"] / gap if gap is not None and gap > 0 else None
        entry["seconds"] = float(np.mean([run["seconds"] for run in runs if run["method"] == method]))
        summary.append(entry)
    return summary


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "interval": None}
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return {"mean": mean, "interval": float(half)}


def shown(value: dict[str, float] | None, sign: str = "") -> str:
    """A mean with half of its interval, in percent; empty for None."""
    if value is None:
        return ""
    interval = "" if value["interval"] is None else f" ± {100 * value['interval']:.2f}"
    return f"{100 * value['mean']:{sign}.2f}{interval}"

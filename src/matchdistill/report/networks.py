"""The table of a page with a row for each network: how good, how large and how fast it is, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matchdistill.report.judgements import size_in_words
from matchdistill.report.runs import Run
from matchdistill.runs.store import WEIGHTS
from matchdistill.tasks.metric import Metric


def networks(runs: Sequence[Run]) -> dict[str, Any]:
    """The table at the top: the networks' metrics, parameters, operations and latencies, the teacher's first."""
    rows: list[dict[str, Any]] = []
    metrics: dict[Metric, None] = {}

    def add(role: str, run: Run, kind: str, time: float | None, gap: float | None = None) -> None:
        assert run.metrics is not None
        costs, count = run.costs.get(kind, {}), run.metrics.parameters.get(kind)
        known = [metric for metric in run.metrics.measured if metric.name in run.metrics.of(kind)]
        metrics.update(dict.fromkeys(known))
        row = {
            "role": role,
            "metrics": {metric.name: metric.shown(run.metrics.of(kind)[metric.name]) for metric in known},
            "gap": _share(gap),
            "parameters": "" if count is None else f"{count:,}",
            "operations": si(costs.get("operations")),
            "latency": f"{1000 * costs['latency']:.2f} ms" if costs else "",
            "batch": _batch(costs.get("best")),
            "file": _file(run, kind),
            "time": "" if time is None else f"{time:,.0f} s",
        }
        same = ("role", "metrics", "parameters")  # runs of one teacher, whose latency each has measured
        if not any(all(row[key] == other[key] for key in same) for other in rows):
            rows.append(row)

    alone = {run.folder.resolve(): run for run in runs if run.method == "none"}
    for run in runs:
        if run.alone is not None:
            alone.setdefault(run.alone.folder.resolve(), run.alone)
    done = [run for run in runs if run.metrics]
    for run in done:
        if run.metrics and run.metrics.teacher:
            name = str(run.recipe["teacher"]["name"]).rpartition(":")[2]
            add(f"teacher, {name}", run, "teacher", run.teacher.seconds if run.teacher else None)
    for run in alone.values():
        if run.metrics:
            add(_named("student alone", run), run, "student", run.seconds)
    for run in done:
        if run.method != "none":
            others = [run.alone] if run.alone else [other for other in alone.values() if other.metrics]
            base = others[0] if len(others) == 1 else None
            add(_named(run.method, run), run, "student", run.seconds, _gap(run, base))
    unfinished = [run.name for run in runs if not run.metrics]
    return {
        "metrics": [(metric.name, metric.label) for metric in metrics],
        "rows": rows,
        "unfinished": ", ".join(unfinished),
        "has_gap": any(row["gap"] for row in rows),
    }


def _named(role: str, run: Run) -> str:
    """A role with the run's name, unless that says it already."""
    return run.name if run.method in run.name and role == run.method else f"{role} ({run.name})"


def _gap(run: Run, alone: Run | None) -> float | None:
    """The share of the distance from the student alone to the teacher that the distilled student has made up."""
    metric = run.comparing
    if metric is None or alone is None or alone.metrics is None or run.metrics is None:
        return None
    measured = (alone.metrics.student, run.metrics.student, run.metrics.teacher)
    found = [values[metric.name] for values in measured if metric.name in values]
    return metric.gap_recovered(*found) if len(found) == len(measured) else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def si(value: float | None) -> str:
    """A number of operations with its prefix."""
    if not value:
        return ""
    power = min(4, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.3g} {' KMGT'[power].strip()}FLOP"


def _batch(best: dict[str, float] | None) -> str:
    """The latency of an image in the best batch; runs of earlier versions have not measured it."""
    return f"{1000 * best['latency'] / best['batch']:.2f} ms at {best['batch']:.0f}" if best else ""


def _file(run: Run, kind: str) -> str:
    """How large a network's file of weights is."""
    folder = run.folder if kind == "student" else run.teacher.folder if run.teacher else None
    path = None if folder is None else folder / WEIGHTS
    return size_in_words(path.stat().st_size) if path is not None and path.is_file() else ""

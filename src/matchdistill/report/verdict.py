"""The first lines of a page: in one sentence what came out, and what is not known with the command that finds it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matchdistill.report.runs import Run
from matchdistill.runs.summary import Entry, Mean, conclusion, summarise, teacher_value
from matchdistill.tasks.metric import Metric


class Verdict(NamedTuple):
    """What a page begins with.

    Attributes:
        sentence: what came out.
        facts: data, date and machine, by heading.
        unknown: what is not known, each with the command that finds it.
    """

    sentence: str
    facts: dict[str, str]
    unknown: list[tuple[str, str]]


def of_run(run: Run) -> Verdict:
    """The verdict on one run."""
    metric, done = run.comparing, run.metrics
    if done is None:
        return Verdict(f"{_networks(run)}: the run is not finished.", _facts(run), [])
    parts = [] if metric is None else [_reached(metric, done.student.get(metric.name), done.teacher.get(metric.name))]
    alone = run.alone.metrics if run.alone else None
    if metric is not None and alone is not None and metric.name in alone.student and metric.name in done.student:
        gain = Mean(done.student[metric.name] - alone.student[metric.name], None)
        parts.append(in_words(gain, metric, 1))
    unknown = [_without_baseline(run)] if run.method != "none" and alone is None and run.task.learns_from else []
    if run.examined is None and run.task.data is not None:
        unknown.append(_without_evidence(run))
    parts += _cheaper(run)
    return Verdict(f"{_networks(run)}: {', '.join(part for part in parts if part)}.", _facts(run), unknown)


def of_comparison(runs: Sequence[Run]) -> Verdict:
    """The verdict on a comparison: on its best method beside training alone."""
    first, entries = runs[0], entries_of(runs)
    metric = first.comparing
    taught = [entry for entry in entries if entry.method != "none" and entry.value is not None]
    if metric is None or not entries or not (taught or entries[0].value):
        return Verdict(f"{_networks(first)}: {'no run is finished' if not entries else 'nothing is measured'}.", {}, [])
    best = best_of(taught or entries, metric)
    assert best is not None
    assert best.value is not None
    done = [run.metrics for run in runs if run.metrics]
    parts = [f"{best.method} reaches {_reached(metric, best.value.mean, teacher_value(done, metric))}"]
    if best.difference is not None:
        parts.append(in_words(best.difference, metric, len(best.seeds)))
    first_of_all = best_of(entries, metric)
    if taught and first_of_all is not None and first_of_all.method == "none":
        parts[0] = f"no method has a better mean than training alone; the best of them, {parts[0]}"
    run = next(run for run in runs if run.metrics and run.method == best.method)
    unknown = []
    if best.method != "none" and best.difference is None:
        unknown.append(
            ("what the student reaches alone", _compare_command(run.folder.parents[2], "none," + best.method))
        )
    return Verdict(f"{_networks(run)}: {', '.join([*parts, *_cheaper(run)])}.", _facts(run, len(best.seeds)), unknown)


def entries_of(runs: Sequence[Run]) -> list[Entry]:
    """What each method came to, by the runs that are finished."""
    done = [run.metrics for run in runs if run.metrics]
    return summarise(done, list(dict.fromkeys(run.method for run in done))) if done else []


def best_of(entries: Sequence[Entry], metric: Metric | None) -> Entry | None:
    """The entry with the best mean; None: nothing is measured."""
    known = {entry.value.mean: entry for entry in entries if entry.value is not None}
    return known[metric.best(known)] if metric is not None and known else None


def in_words(difference: Mean, metric: Metric, seeds: int) -> str:
    """A difference to training alone for people, with how sure it is. The one place that says so on the pages."""
    better = difference.mean >= 0
    size = Mean(abs(difference.mean), difference.interval).shown(metric, "+" if better else "")
    way = "over" if better else "below"
    told = f"{seeds} seeds" if difference.tells(seeds) else conclusion(difference, seeds, metric)
    return f"{size}{' points' if metric.share else ''} {way} training alone ({told})"


def _reached(metric: Metric, own: float | None, teacher: float | None) -> str:
    if own is None:
        return ""
    beside = "" if teacher is None else f" of the teacher's {metric.shown(teacher)}"
    return f"{metric.shown(own)}{beside} {metric.label}"


def _networks(run: Run) -> str:
    names = [_name(run.recipe.get(role)) for role in (("teacher", "student") if run.method != "none" else ("student",))]
    return f"{' → '.join(name for name in names if name)} on {data_name(run)}"


def _name(network: Any) -> str:
    """A network's name without where its function is; of one around a backbone, what says more than the function's."""
    network = network or {}
    name, options = str(network.get("name") or "").rpartition(":")[2], network.get("options") or {}
    backbone = str(options.get("backbone") or "").rpartition(":")[2]
    return f"{options.get('architecture', name)} ({backbone})" if backbone else name


def data_name(run: Run) -> str:
    """What the data is called: its folder, or its name."""
    data = run.recipe.get("data") or {}
    root = data.get("root")
    return Path(str(root)).name or str(root) if root else str(data.get("name") or "its data")


def _cheaper(run: Run) -> list[str]:
    """How much smaller and faster the student is than its teacher, as far as it was measured."""
    if run.metrics is None or run.method == "none":
        return []
    said = []
    counts = run.metrics.parameters
    if counts.get("student") and counts.get("teacher"):
        said.append(
            _times(float(counts["teacher"] or 0) / float(counts["student"] or 1), "fewer", "more", " parameters")
        )
    latencies = [float((run.costs.get(role) or {}).get("latency") or 0) for role in ("teacher", "student")]
    if all(latencies):
        said.append(_times(latencies[0] / latencies[1], "faster", "slower", " at batch 1"))
    return said


def _times(ratio: float, less: str, more: str, what: str) -> str:
    """A ratio in words.

    Examples:
        >>> _times(19.2, "fewer", "more", " parameters"), _times(0.5, "faster", "slower", "")
        ('19x fewer parameters', '2x slower')
    """
    size, word = (ratio, less) if ratio >= 1 else (1 / ratio, more)
    return f"{size:.0f}x {word}{what}" if size >= 10 else f"{size:.2g}x {word}{what}"


def _facts(run: Run, seeds: int | None = None) -> dict[str, str]:
    about = run.environment
    threads = f", threads: {about['threads']}" if "threads" in about else ""
    images = run.examined
    data = data_name(run) + ("" if images is None else f", {images.images:,} validation images")
    if images is not None and len(images.index) < images.images:
        data += f" ({len(images.index):,} of them looked at one by one)"
    return {
        "Data": data,
        **({"Trained": str(about["begun"])} if "begun" in about else {}),
        **({"Machine": f"{about['device']}{threads}"} if "device" in about else {}),
        "Seeds": f"{seeds}" if seeds is not None else f"one ({run.recipe.get('seed', 0)})",
    }


def _without_baseline(run: Run) -> tuple[str, str]:
    given, out = shlex.quote(str(run.folder / "recipe.yaml")), shlex.quote(str(run.folder))
    return ("what the student reaches alone", f"matchdistill fit {given} --out {out} --resume --baseline")


def _compare_command(folder: Path, methods: str) -> str:
    given = shlex.quote(str(folder / "recipe.yaml"))
    return f"matchdistill compare {given} --methods {methods} --seeds 3 --out {shlex.quote(f'{folder}-compared')}"


def _without_evidence(run: Run) -> tuple[str, str]:
    given = shlex.quote(str(run.folder / "recipe.yaml"))
    return (
        "classes, calibration and single images: this run kept nothing of them",
        f"matchdistill fit {given} --out {shlex.quote(f'{run.folder}-again')}",
    )

"""Charts of runs side by side, and of one run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from matchdistill.report.charts import BASELINE, TEACHER, Chart, colour, layout, zoomed
from matchdistill.report.runs import Point, Run
from matchdistill.runs.summary import teacher_value
from matchdistill.tasks.metric import Metric

MOST_POINTS = 500  # of a curve
MOST_MARKS = 60  # refreshes marked by a line
BESIDE = "student alone"  # the curve beside that of one run


def curves(runs: Sequence[Run]) -> Chart | None:
    """The losses, the student's metric and the cost of the matching, by step; None before the first epoch's end.

    Of one run the features' losses are by position and refreshes are lines; of several there is a line for each run.
    """
    metric = runs[0].comparing
    # A metric may be called as one of the others: its row has a key of its own.
    measure, label = ("", "") if metric is None else (f"val/{metric.name}", metric.label)
    single = runs[0] if len(runs) == 1 else None
    rows = _rows(runs, measure)
    if not rows:
        return None
    figure = make_subplots(len(rows), 1, shared_xaxes=True, vertical_spacing=0.05)
    named: set[str] = set()
    for row, (name, lines) in enumerate(rows.items(), 1):
        title = label if name == measure else name
        for number, (series, points) in enumerate(lines):
            shown = _thinned(points)
            of_run = single is not None and name in ("loss", measure) and series != BESIDE
            figure.add_scatter(
                x=[point.step for point in shown],
                y=[point.value for point in shown],
                customdata=[point.epoch + 1 for point in shown],
                hovertemplate="%{y:.4g}, step %{x}, epoch %{customdata}",
                name=title if of_run else series,
                legendgroup=name if of_run else series,
                showlegend=not of_run and series not in named,
                mode="lines+markers" if name == "matching cost" or len(shown) < 30 else "lines",
                line={"color": _shade(series, number, runs)},
                row=row,
                col=1,
            )
            named |= set() if of_run else {series}
        axis: dict[str, Any] = {}
        if metric is not None and name == measure:
            teacher = teacher_value([run.metrics for run in runs if run.metrics], metric)
            own = [[point.value for point in points] for _, points in lines]
            axis["range"] = zoomed(own, *([] if teacher is None else [teacher]))
            axis |= {"tickformat": ".1%"} if metric.share else {}
            if teacher is not None:
                ends = [min(point.step for _, points in lines for point in points)]
                ends.append(max(point.step for _, points in lines for point in points))
                dash = {"dash": "dash", "color": TEACHER}
                y = [teacher, teacher]
                figure.add_scatter(x=ends, y=y, name="teacher", mode="lines", line=dash, row=row, col=1)
        figure.update_yaxes(title_text=title, row=row, col=1, **axis)
    moments = single.refreshes if single else []
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "opacity": 0.6}
    line["line"] = {"width": 1, "dash": "dot", "color": "#7f7f7f"}
    marked = [moment["step"] for moment in moments[:: -(-len(moments) // MOST_MARKS) or 1]]
    figure.update_layout(shapes=[{**line, "x0": step, "x1": step} for step in marked])
    figure.update_xaxes(title_text="step", row=len(rows), col=1)
    said = [_course(run, metric) for run in runs]
    marks = " Dotted lines are refreshes of the matching." if moments else ""
    return Chart(
        layout(figure, 120 + 170 * len(rows)), f"Training. {' '.join(said)}{marks}", _title(rows, measure, label)
    )


def _shade(series: str, number: int, runs: Sequence[Run]) -> str:
    """The colour of a curve: grey for a student alone."""
    alone = series == BESIDE or (
        len(runs) > 1 and any(series == escape(run.name) and run.method == "none" for run in runs)
    )
    return BASELINE if alone else colour(number)


def _title(rows: dict[str, Any], measure: str, label: str) -> str:
    """What the chart of the curves shows."""
    names = [label if name == measure else name for name in rows]
    return f"Training: {', '.join(names)}"


def _rows(runs: Sequence[Run], measure: str) -> dict[str, list[tuple[str, list[Point]]]]:
    """What each row of `curves` shows: names of series with their points; rows without a point are left out."""
    single = runs[0] if len(runs) == 1 else None
    rows: dict[str, list[tuple[str, list[Point]]]] = {"loss": [], "features": [], measure: [], "matching cost": []}
    for run in runs:
        name = escape(run.name)  # Plotly takes some markup
        rows["loss"].append((name, losses(run)))
        rows[measure].append((name, run.curves.get(measure, [])))
        if single is not None and run.alone is not None:
            rows[measure].append((BESIDE, run.alone.curves.get(measure, [])))
        costs = [[Point(r["step"], r["epoch"], cost) for cost in r["cost"]] for r in run.refreshes]
        if single is None:
            rows["features"].append((name, run.curves.get("train/features", [])))
            means = [Point(*each[0][:2], float(np.mean([point.value for point in each]))) for each in costs]
            rows["matching cost"].append((name, means))
        else:
            for number, each in enumerate(zip(*costs, strict=True)):
                name, logged = escape(run.layer(number)), f"train/features_{number}"
                rows["features"].append((name, run.curves.get(f"{logged}_epoch") or run.curves.get(logged, [])))
                rows["matching cost"].append((name, list(each)))
            if not costs:
                rows["features"].append(("features", run.curves.get("train/features", [])))
    return {name: lines for name, lines in rows.items() if any(points for _, points in lines)}


def losses(run: Run) -> list[Point]:
    """The total loss by epoch; before the end of the first one the sum of what was logged by step."""
    if loss := run.curves.get("train/loss"):
        return loss
    totals: dict[int, Point] = {}
    for name, points in run.curves.items():
        for point in points if name.startswith("train/") else ():
            before = totals.get(point.step, point._replace(value=0.0))
            totals[point.step] = before._replace(value=before.value + point.value)
    return [totals[step] for step in sorted(totals)]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """So few that the page stays small, with the last."""
    every = -(-len(points) // MOST_POINTS)
    return points[::-1][::every][::-1] if points else points


def _course(run: Run, metric: Metric | None) -> str:
    said = []
    if loss := losses(run):
        course = f"goes from {loss[0].value:.4g} to" if len(loss) > 1 else "is"
        said.append(f"the loss {course} {loss[-1].value:.4g} in {loss[-1].step + 1} steps")
    if metric is not None and (values := run.curves.get(f"val/{metric.name}")):
        last, best = metric.shown(values[-1].value), metric.shown(metric.best(point.value for point in values))
        said.append(f"{metric.label} ends at {last} (best {best})")
    if run.refreshes:
        said.append(f"{len(run.refreshes)} refreshes of the matching")
    return f"{run.name}: {', '.join(said)}." if said else f"{run.name}: nothing was logged yet."


def seconds(run: Run) -> dict[str, float]:
    """Where a run's time went: its teacher's training, steps, refreshes and validation."""
    epochs, validation = (
        sum(point.value for point in run.curves.get(f"seconds/{name}", [])) for name in ("epoch", "validation")
    )
    refreshes = sum(moment["seconds"] for moment in run.refreshes)
    teacher = run.teacher.metrics.seconds if run.teacher and run.teacher.metrics else 0.0
    found = {
        "teacher's training": teacher,
        "steps": max(0.0, epochs - validation - refreshes),
        "refreshes": refreshes,
        "validation": validation,
    }
    return {name: value for name, value in found.items() if value > 0}


def times(runs: Sequence[Run]) -> Chart | None:
    """Where the time went, a bar for each run."""
    spent = {run.name: seconds(run) for run in runs}
    parts = list(dict.fromkeys(part for own in spent.values() for part in own))
    if not parts:
        return None
    figure = go.Figure()
    for number, part in enumerate(parts):
        values = [own.get(part, 0.0) for own in spent.values()]
        figure.add_bar(y=list(map(escape, spent)), x=values, name=part, orientation="h", marker_color=colour(number))
    figure.update_layout(barmode="stack", xaxis_title="seconds")
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    said = [
        f"{name}: {', '.join(f'{part} {value:.3g} s' for part, value in own.items())}." for name, own in spent.items()
    ]
    return Chart(layout(figure, 150 + 32 * len(runs)), f"Seconds by part. {' '.join(said)}", "Where the time went")


def churn(run: Run) -> Chart | None:
    """The share of teacher channels that changed their student channel, by refresh and position."""
    later = [moment for moment in run.refreshes if None not in moment["churn"]]
    if not later:
        return None
    figure = go.Figure()
    for number, values in enumerate(zip(*(moment["churn"] for moment in later), strict=True)):
        figure.add_scatter(
            x=[moment["step"] for moment in later],
            y=values,
            mode="lines+markers",
            name=escape(run.layer(number)),
            line_color=colour(number),
        )
    figure.update_layout(xaxis_title="step", yaxis_title="changed", yaxis_tickformat=".0%", yaxis_rangemode="tozero")
    last = ", ".join(f"{run.layer(place)} {value:.0%}" for place, value in enumerate(later[-1]["churn"]))
    return Chart(
        layout(figure, 300),
        "Churn: the share of teacher channels that changed their student channel at a refresh. At the last one "
        f"{last}.",
        "Churn of the matching",
    )


def ignored(run: Run) -> Chart | None:
    """The share of elements that the partial loss leaves alone, by position."""
    if "final" not in run.matchings:
        return None
    shares = run.matchings["final"][1]["ignored"]
    names = [run.layer(number) for number in range(len(shares))]
    figure = go.Figure(
        go.Bar(x=list(map(escape, names)), y=shares, marker_color=[colour(number) for number in range(len(shares))])
    )
    figure.update_layout(yaxis_tickformat=".0%", yaxis_range=[0, 1])
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
    return Chart(
        layout(figure, 260),
        f"Elements that the partial loss leaves alone, as student and target both vanish behind the activation: {said}.",
        "What the loss ignores",
    )

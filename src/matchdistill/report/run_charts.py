"""Charts of runs side by side, and of one run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from matchdistill.report.charts import Chart, colour, layout
from matchdistill.report.runs import Point, Run
from matchdistill.tasks.metric import Metric

MOST_POINTS = 500  # of a curve
MOST_MARKS = 60  # refreshes marked by a line


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
            of_run = single is not None and name in ("loss", measure)
            figure.add_scatter(
                x=[point.step for point in shown],
                y=[point.value for point in shown],
                customdata=[point.epoch + 1 for point in shown],
                hovertemplate="%{y:.4g}, step %{x}, epoch %{customdata}",
                name=title if of_run else series,
                legendgroup=name if of_run else series,
                showlegend=not of_run and series not in named,
                mode="lines+markers" if name == "matching cost" or len(shown) < 30 else "lines",
                line={"color": "#7f7f7f" if of_run else colour(number)},
                row=row,
                col=1,
            )
            named |= set() if of_run else {series}
        share = {"tickformat": ".0%", "rangemode": "tozero"} if metric and metric.share and name == measure else {}
        figure.update_yaxes(title_text=title, row=row, col=1, **share)
    moments = single.refreshes if single else []
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "opacity": 0.6}
    line["line"] = {"width": 1, "dash": "dot", "color": "#7f7f7f"}
    marked = [moment["step"] for moment in moments[:: -(-len(moments) // MOST_MARKS) or 1]]
    figure.update_layout(shapes=[{**line, "x0": step, "x1": step} for step in marked])
    figure.update_xaxes(title_text="step", row=len(rows), col=1)
    said = [_course(run, metric) for run in runs]
    marks = " Dotted lines are refreshes of the matching." if moments else ""
    return Chart(layout(figure, 120 + 170 * len(rows)), f"Training. {' '.join(said)}{marks}")


def _rows(runs: Sequence[Run], measure: str) -> dict[str, list[tuple[str, list[Point]]]]:
    """What each row of `curves` shows: names of series with their points; rows without a point are left out."""
    single = runs[0] if len(runs) == 1 else None
    rows: dict[str, list[tuple[str, list[Point]]]] = {"loss": [], "features": [], measure: [], "matching cost": []}
    for run in runs:
        name = escape(run.name)  # Plotly takes some markup
        rows["loss"].append((name, losses(run)))
        rows[measure].append((name, run.curves.get(measure, [])))
        costs = [[Point(r["step"], r["epoch"], cost) for cost in r["cost"]] for r in run.refreshes]
        if single is None:
            rows["features"].append((name, run.curves.get("train/features", [])))
            means = [Point(*each[0][:2], float(np.mean([point.value for point in each]))) for each in costs]
            rows["matching cost"].append((name, means))
        else:
            for number, each in enumerate(zip(*costs, strict=True)):
                name, logged = f"position {number}", f"train/features_{number}"
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
        said.append(f"the loss goes from {loss[0].value:.4g} to {loss[-1].value:.4g} in {loss[-1].step + 1} steps")
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
    return Chart(layout(figure, 150 + 32 * len(runs)), f"Where the time went. {' '.join(said)}")


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
            name=f"position {number}",
            line_color=colour(number),
        )
    figure.update_layout(xaxis_title="step", yaxis_title="changed", yaxis_tickformat=".0%", yaxis_rangemode="tozero")
    last = ", ".join(f"{value:.0%}" for value in later[-1]["churn"])
    return Chart(
        layout(figure, 300),
        "Churn: the share of teacher channels that changed their student channel at a refresh. At the last one "
        f"{last}, by position.",
    )


def ignored(run: Run) -> Chart | None:
    """The share of elements that the partial loss leaves alone, by position."""
    if "final" not in run.matchings:
        return None
    shares = run.matchings["final"][1]["ignored"]
    names = [f"position {number}" for number in range(len(shares))]
    figure = go.Figure(go.Bar(x=names, y=shares, marker_color=[colour(number) for number in range(len(shares))]))
    figure.update_layout(yaxis_tickformat=".0%", yaxis_range=[0, 1])
    said = ", ".join(f"{share:.0%}" for share in shares)
    return Chart(
        layout(figure, 260),
        f"Elements that the partial loss leaves alone, as student and target both vanish behind the activation: {said}, "
        "by position.",
    )

"""The charts of the pages, each with the sentence that says what is to be seen in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape, unescape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from matchdistill.report.runs import Point, Run
from matchdistill.runs.evidence import most_similar_first
from matchdistill.runs.summary import summarise
from matchdistill.tasks.base import metric_label

# Okabe and Ito's, which are told apart with any colour vision; their yellow is too pale on white, black on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
WHEN = {
    "first": "before training, at the first refresh",
    "last": "at the last refresh",
    "final": "after training, by the matching in force",
}
MOST_POINTS = 500  # of a curve
MOST_MARKS = 60  # refreshes marked by a line


class Chart(NamedTuple):
    """A figure and its text alternative."""

    figure: go.Figure
    caption: str


def colour(number: int) -> str:
    """Of a series."""
    return COLOURS[number % len(COLOURS)]


def _layout(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"}
    top = 48 if len(figure.data) > 1 or layout else 16
    return figure.update_layout(height=height, margin={"l": 60, "r": 16, "t": top, "b": 48}, legend=legend, **layout)


def curves(runs: Sequence[Run]) -> Chart | None:
    """The losses, the student's metric and the cost of the matching, by step; None before the first epoch's end.

    Of one run the features' losses are by position and refreshes are lines; of several there is a line for each run.
    """
    metric = next((name for run in runs for name in run.curves if name in ("val/top1", "val/ap")), "")
    label = metric_label(metric.removeprefix("val/"))
    single = runs[0] if len(runs) == 1 else None
    rows: dict[str, list[tuple[str, list[Point]]]] = {"loss": [], "features": [], label: [], "matching cost": []}
    for run in runs:
        name = escape(run.name)  # Plotly takes some markup
        rows["loss"].append((name, losses(run)))
        rows[label].append((name, run.curves.get(metric, [])))
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
    rows = {name: lines for name, lines in rows.items() if any(points for _, points in lines)}
    if not rows:
        return None
    figure = make_subplots(len(rows), 1, shared_xaxes=True, vertical_spacing=0.05)
    named: set[str] = set()
    for row, (name, lines) in enumerate(rows.items(), 1):
        for number, (series, points) in enumerate(lines):
            shown = _thinned(points)
            of_run = single is not None and name in ("loss", label)
            figure.add_scatter(
                x=[point.step for point in shown],
                y=[point.value for point in shown],
                customdata=[point.epoch + 1 for point in shown],
                hovertemplate="%{y:.4g}, step %{x}, epoch %{customdata}",
                name=name if of_run else series,
                legendgroup=name if of_run else series,
                showlegend=not of_run and series not in named,
                mode="lines+markers" if name == "matching cost" or len(shown) < 30 else "lines",
                line={"color": "#7f7f7f" if of_run else colour(number)},
                row=row,
                col=1,
            )
            named |= set() if of_run else {series}
        share = {"tickformat": ".0%", "rangemode": "tozero"} if name == label else {}
        figure.update_yaxes(title_text=name, row=row, col=1, **share)
    moments = single.refreshes if single else []
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "opacity": 0.6}
    line["line"] = {"width": 1, "dash": "dot", "color": "#7f7f7f"}
    marked = [moment["step"] for moment in moments[:: -(-len(moments) // MOST_MARKS) or 1]]
    figure.update_layout(shapes=[{**line, "x0": step, "x1": step} for step in marked])
    figure.update_xaxes(title_text="step", row=len(rows), col=1)
    said = [_course(run, metric, label) for run in runs]
    marks = " Dotted lines are refreshes of the matching." if moments else ""
    return Chart(_layout(figure, 120 + 170 * len(rows)), f"Training. {' '.join(said)}{marks}")


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


def _course(run: Run, metric: str, label: str) -> str:
    said = []
    if loss := losses(run):
        said.append(f"the loss goes from {loss[0].value:.4g} to {loss[-1].value:.4g} in {loss[-1].step + 1} steps")
    if values := run.curves.get(metric):
        best = max(point.value for point in values)
        said.append(f"{label} ends at {values[-1].value:.2%} (best {best:.2%})")
    if run.refreshes:
        said.append(f"{len(run.refreshes)} refreshes of the matching")
    return f"{run.name}: {', '.join(said)}." if said else f"{run.name}: nothing was logged yet."


def seconds(run: Run) -> dict[str, float]:
    """Where a run's time went: its teacher's training, steps, refreshes and validation."""
    epochs, validation = (
        sum(point.value for point in run.curves.get(f"seconds/{name}", [])) for name in ("epoch", "validation")
    )
    refreshes = sum(moment["seconds"] for moment in run.refreshes)
    teacher = run.teacher.metrics["seconds"] if run.teacher and run.teacher.metrics else 0.0
    found = {
        "teacher's training": teacher,
        "steps": max(0.0, epochs - validation - refreshes),
        "refreshes": refreshes,
        "validation": validation,
    }
    if not epochs and run.seconds is not None:  # of an older version
        found["training"] = run.seconds
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
    return Chart(_layout(figure, 150 + 32 * len(runs)), f"Where the time went. {' '.join(said)}")


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
        _layout(figure, 300),
        "Churn: the share of teacher channels that changed their student channel at a refresh. At the last one "
        f"{last}, by position.",
    )


def ignored(run: Run) -> Chart | None:
    """The share of elements that the partial loss leaves alone, by position."""
    if "final" not in run.matched:
        return None
    shares = run.matched["final"][1]["ignored"]
    names = [f"position {number}" for number in range(len(shares))]
    figure = go.Figure(go.Bar(x=names, y=shares, marker_color=[colour(number) for number in range(len(shares))]))
    figure.update_layout(yaxis_tickformat=".0%", yaxis_range=[0, 1])
    said = ", ".join(f"{share:.0%}" for share in shares)
    return Chart(
        _layout(figure, 260),
        f"Elements that the partial loss leaves alone, as student and target both vanish behind the activation: {said}, "
        "by position.",
    )


def heat(run: Run, number: int, moment: str) -> Chart:
    """The costs of a position with the matching on the diagonal."""
    tensors, told = run.matched[moment]
    about, values = told["positions"][number], tensors[f"heat{number}"].float()
    students, teachers = about["student channels"], about["teacher channels"]
    blocks = [math.ceil(size / cells) for size, cells in zip((students, teachers), values.shape, strict=True)]
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            zmin=0,
            zmax=4,
            colorscale="Viridis",
            reversescale=True,
            colorbar={"title": "cost", "thickness": 12},
            hovertemplate="cost %{z:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=f"{teachers} teacher channels", showticklabels=False)
    figure.update_yaxes(title_text=f"{students} student channels", showticklabels=False, autorange="reversed")
    when = WHEN[moment]
    each = "" if max(blocks) == 1 else f" Each cell is the mean of up to {blocks[0]} x {blocks[1]} pairs."
    matched = about["mean cost"]
    return Chart(
        _layout(figure, 340, title_text=when.partition(",")[0]),
        f"Costs {when}: 0 is the same pattern, 2 an unrelated one. Channels are in the order of the matching, which is "
        f"the diagonal; its mean cost is {matched:.2f}.{each}",
    )


def similarity(run: Run, number: int) -> Chart:
    """The similarity of every student channel to its group, before and after the training."""
    figure = go.Figure()
    moments = [(name, run.matched[name]) for name in run.moments]
    order = most_similar_first(moments[-1][1][0][f"similarity{number}"].float())
    said = []
    for place, (moment, (tensors, _)) in enumerate(moments):
        values, index = tensors[f"similarity{number}"].float(), tensors[f"index{number}"]
        when = WHEN[moment].partition(",")[0]
        figure.add_scatter(
            y=values[order].numpy(),
            customdata=[f"student channel {own}<br>{_members(index[own])}" for own in order.tolist()],
            hovertemplate="%{y:.2f}<br>%{customdata}",
            name=when,
            mode="markers",
            marker={"size": 5, "color": colour(place)},
        )
        known = values[values.isfinite()]
        said.append(f"{when} {known.min():.2f}, {known.median():.2f} and {known.max():.2f}")
    figure.update_xaxes(title_text="student channels, the most similar first", showticklabels=False)
    figure.update_layout(yaxis_title="cosine")
    return Chart(
        _layout(figure, 320),
        "Mean cosine of each student channel to its teacher channels; least, median and most: " + "; ".join(said) + ".",
    )


def _members(index: Tensor) -> str:
    members = [str(member) for member in index.tolist() if member >= 0]
    more = f" and {len(members) - 8} more" if len(members) > 8 else ""
    return f"teacher channels {', '.join(members[:8])}{more}" if members else "no teacher channel"


def margins(run: Run, number: int) -> Chart:
    """The distribution of a position's margins."""
    tensors, told = run.matched[run.moments[-1]]
    values = tensors[f"margin{number}"].float()
    figure = go.Figure(go.Histogram(x=values.numpy(), nbinsx=40, marker_color=COLOURS[0]))
    figure.update_layout(xaxis_title="margin", yaxis_title="student channels", bargap=0.05)
    source = told["positions"][number]["margins"]
    origin = "measured" if source == "measured" else f"from {source}"
    return Chart(
        _layout(figure, 300),
        f"Margins, {origin}: how far below zero the targets may go. Least {values.min():.2f}, median "
        f"{values.median():.2f}, most {values.max():.2f}.",
    )


def differences(summary: Sequence[dict[str, Any]], metric: str, base: str = "none") -> Chart | None:
    """What each method gains over the base, paired by seed, with its interval."""
    entries = [entry for entry in summary if entry["difference"]]
    if not entries:
        return None
    figure = go.Figure(
        go.Scatter(
            x=[100 * entry["difference"]["mean"] for entry in entries],
            y=[entry["method"] for entry in entries],
            error_x={"type": "data", "array": [100 * (entry["difference"]["interval"] or 0) for entry in entries]},
            mode="markers",
            marker={"size": 9, "color": COLOURS[0]},
        )
    )
    figure.add_vline(0, line={"width": 1, "color": "#7f7f7f"})
    figure.update_xaxes(title_text=f"points of {metric_label(metric)} above {base!r}")
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    said = []
    for entry in entries:
        mean, half = entry["difference"]["mean"], entry["difference"]["interval"]
        said.append(f"{entry['method']} {100 * mean:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}"))
    return Chart(
        _layout(figure, 130 + 36 * len(entries)),
        f"Differences to {base!r}, paired by seed, with 95% intervals: {', '.join(said)} points.",
    )


def by_method(runs: Sequence[Run], metric: str) -> Chart | None:
    """The metric by epoch: a thin line for each run, a thick one for the mean of a method's finished runs."""
    methods = list(dict.fromkeys(run.method for run in runs))
    figure, said = go.Figure(), []
    for number, method in enumerate(methods):
        lines = [points for run in runs if run.method == method and (points := run.curves.get(f"val/{metric}"))]
        for points in lines:
            figure.add_scatter(
                x=[point.epoch + 1 for point in points],
                y=[point.value for point in points],
                line={"width": 1, "color": colour(number)},
                opacity=0.3,
                mode="lines",
                showlegend=False,
                hoverinfo="skip",
            )
        done = [run.curves.get(f"val/{metric}", []) for run in runs if run.method == method and run.metrics]
        if done:
            epochs = sorted(set.intersection(*({point.epoch for point in points} for points in done)))
            by_epoch = [{point.epoch: point.value for point in points} for points in done]
            means = [float(np.mean([values[epoch] for values in by_epoch])) for epoch in epochs]
            figure.add_scatter(
                x=[epoch + 1 for epoch in epochs], y=means, name=method, line={"width": 3, "color": colour(number)}
            )
            if means:
                said.append(f"{method} {means[-1]:.2%} over {len(done)} runs")
    if not figure.data:
        return None
    figure.update_layout(xaxis_title="epoch", yaxis_title=metric_label(metric), yaxis_tickformat=".0%")
    return Chart(
        _layout(figure, 380),
        f"{metric_label(metric)} by epoch, thin lines by run, thick ones the mean of those that are finished. At the end "
        f"{', '.join(said) or 'there is none yet'}.",
    )


def costs(runs: Sequence[Run]) -> Chart | None:
    """Time and memory of each method, means over its runs."""
    done = [run for run in runs if run.metrics]
    methods = list(dict.fromkeys(run.method for run in done))
    if not methods:
        return None
    spent, held = [], []
    for method in methods:
        own = [run for run in done if run.method == method]
        spent.append(float(np.mean([run.metrics["seconds"] for run in own if run.metrics])))
        memory = [run.costs["memory"] for run in own if run.costs.get("memory")]
        held.append(float(np.mean(memory)) / 2**20 if memory else math.nan)
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    figure.add_bar(y=methods, x=spent, orientation="h", marker_color=COLOURS[0], row=1, col=1)
    figure.add_bar(y=methods, x=held, orientation="h", marker_color=COLOURS[1], row=1, col=2)
    figure.update_xaxes(title_text="seconds per run", row=1, col=1)
    figure.update_xaxes(title_text="peak memory, MiB", row=1, col=2)
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    figure.update_layout(showlegend=False)
    said = [
        f"{method} {time:.0f} s" + ("" if math.isnan(memory) else f", {memory:.0f} MiB")
        for method, time, memory in zip(methods, spent, held, strict=True)
    ]
    return Chart(_layout(figure, 130 + 32 * len(methods)), f"Cost of a run, means: {'; '.join(said)}.")


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """As of `summary.summarise`, of the runs that are finished."""
    done = [run.metrics for run in runs if run.metrics]
    return summarise(done, list(dict.fromkeys(run["method"] for run in done))) if done else []


def values(figure: go.Figure, most: int = 400) -> list[tuple[str, str, str]] | None:
    """The points of a figure as text, (series, x, y); None of a map, or where they are too many to be read."""
    rows: list[tuple[str, str, str]] = []
    for trace in figure.data:
        if trace.type not in ("scatter", "bar") or trace.hoverinfo == "skip":
            continue
        ys = list(trace.y)
        xs = list(range(len(ys))) if trace.x is None else list(trace.x)
        rows += [(_text(trace.name or ""), _text(x), _text(y)) for x, y in zip(xs, ys, strict=True)]
    return rows if 0 < len(rows) <= most else None


def _text(value: Any) -> str:
    return unescape(value) if isinstance(value, str) else f"{float(value):.4g}"  # names are escaped for Plotly alone

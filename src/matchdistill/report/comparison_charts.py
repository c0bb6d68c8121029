"""Charts of the methods of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from matchdistill.report.charts import BASELINE, COLOURS, TEACHER, Chart, colour, layout, zoomed
from matchdistill.report.runs import Run
from matchdistill.report.verdict import entries_of
from matchdistill.runs.summary import teacher_value


def differences(runs: Sequence[Run], base: str = "none") -> Chart | None:
    """What each method gains over the base, paired by seed, with its interval."""
    metric = runs[0].comparing
    entries = [(entry.method, entry.difference) for entry in entries_of(runs) if entry.difference]
    if not entries or metric is None:
        return None
    figure = go.Figure(
        go.Scatter(
            x=[metric.scale * difference.mean for _, difference in entries],
            y=[method for method, _ in entries],
            error_x={"type": "data", "array": [metric.scale * (difference.interval or 0) for _, difference in entries]},
            mode="markers",
            marker={"size": 9, "color": COLOURS[0]},
        )
    )
    figure.add_vline(0, line={"width": 1, "color": "#7f7f7f"})
    title = f"points of {metric.label} above {base!r}" if metric.share else f"{metric.label} above that of {base!r}"
    figure.update_xaxes(title_text=title)
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    said = ", ".join(f"{method} {difference.shown(metric, '+')}" for method, difference in entries)
    return Chart(
        layout(figure, 130 + 36 * len(entries)),
        f"Differences to {base!r}, paired by seed, with 95% intervals: {said}{' points' if metric.share else ''}.",
        f"Gain over {base!r}",
    )


def by_method(runs: Sequence[Run]) -> Chart | None:
    """The metric by epoch: a thin line for each run, a thick one for the mean of a method's finished runs."""
    metric = runs[0].comparing
    if metric is None:
        return None
    methods = list(dict.fromkeys(run.method for run in runs))
    figure, said, shown = go.Figure(), [], []
    longest = max((point.epoch + 1 for run in runs for point in run.curves.get(f"val/{metric.name}", [])), default=1)
    taught = [method for method in methods if method != "none"]
    for method in methods:
        shade = BASELINE if method == "none" else colour(taught.index(method))
        lines = [points for run in runs if run.method == method and (points := run.curves.get(f"val/{metric.name}"))]
        for points in lines:
            figure.add_scatter(
                x=[point.epoch + 1 for point in points],
                y=[point.value for point in points],
                line={"width": 1, "color": shade},
                opacity=0.3,
                mode="lines",
                showlegend=False,
                hoverinfo="skip",
            )
        done = [run.curves.get(f"val/{metric.name}", []) for run in runs if run.method == method and run.metrics]
        if done:
            epochs = sorted(set.intersection(*({point.epoch for point in points} for points in done)))
            by_epoch = [{point.epoch: point.value for point in points} for points in done]
            means = [float(np.mean([values[epoch] for values in by_epoch])) for epoch in epochs]
            line = {"width": 3, "color": shade}
            if not any(done):  # nothing was trained
                own = [run.metrics.student[metric.name] for run in runs if run.method == method and run.metrics]
                epochs, means, line = [0, longest - 1], [float(np.mean(own))] * 2, {**line, "dash": "dot"}
            figure.add_scatter(x=[epoch + 1 for epoch in epochs], y=means, name=method, line=line)
            shown.append(means)
            if means:
                said.append(f"{method} {metric.shown(means[-1])} over {len(done)} run{'s' * (len(done) != 1)}")
    if not figure.data:
        return None
    teacher = teacher_value([run.metrics for run in runs if run.metrics], metric)
    if teacher is not None:
        line = {"dash": "dash", "color": TEACHER}
        figure.add_scatter(x=[1, longest], y=[teacher, teacher], name="teacher", mode="lines", line=line)
    figure.update_layout(xaxis_title="epoch", yaxis_title=metric.label, yaxis_tickformat=".1%" if metric.share else "")
    figure.update_yaxes(range=zoomed(shown, *([] if teacher is None else [teacher])))
    return Chart(
        layout(figure, 380),
        f"{metric.label} by epoch, thin lines by run, thick ones the mean of those that are finished. At the end "
        f"{', '.join(said) or 'there is none yet'}. The axis begins where the curves are after a third of the epochs.",
        f"{metric.label} by epoch",
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
        spent.append(float(np.mean([run.metrics.seconds for run in own if run.metrics])))
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
    return Chart(
        layout(figure, 130 + 32 * len(methods)), f"Cost of a run, means: {'; '.join(said)}.", "Cost of training"
    )

"""Charts of what the networks of a run make of each class of the validation images."""

from __future__ import annotations

import math
from html import escape

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from matchdistill.report.charts import BASELINE, COLOURS, TEACHER, Chart, layout
from matchdistill.report.judgements import ALONE, judged, own_name
from matchdistill.report.judgements import TEACHER as THE_TEACHER
from matchdistill.report.runs import Run
from matchdistill.tasks.judging import calibration_error

MOST_CLASSES = 40  # that are shown by themselves
MOST_CELLS = 30  # classes of a confusion matrix that is shown whole
MOST_CONFUSED = 20


def _marks(role: str) -> tuple[str, str]:
    """The colour and the symbol of a network."""
    return {ALONE: (BASELINE, "circle-open"), THE_TEACHER: (TEACHER, "line-ns-open")}.get(role, (COLOURS[0], "circle"))


def by_class(run: Run) -> Chart | None:
    """The value of each class for every network; of many classes the ones in which they differ most, and the worst."""
    found = judged(run)
    if run.examined is None or not found:
        return None
    own, values = found[own_name(run)], {role: each.classes.double() for role, each in found.items()}
    places = [int(place) for place in torch.nonzero(own.counts > 0).flatten()]
    if not places:
        return None
    left_out = len(places) - MOST_CLASSES
    if left_out > 0:
        others = [each for role, each in values.items() if role != own_name(run)]
        apart = torch.stack([(own.classes - each).abs() for each in others]).nan_to_num(0).amax(0) if others else None
        order = -apart if apart is not None else own.classes.nan_to_num(2)
        places = sorted(sorted(places, key=lambda place: float(order[place]))[:MOST_CLASSES])
    names = [f"{escape(run.examined.classes[place])} ({int(own.counts[place]):,})" for place in places]
    figure = go.Figure()
    for role, each in values.items():
        shade, symbol = _marks(role)
        figure.add_scatter(
            x=each[places].numpy(),
            y=names,
            name=escape(role),
            mode="markers",
            marker={"size": 11, "color": shade, "symbol": symbol, "line": {"width": 2, "color": shade}},
        )
    figure.update_xaxes(title_text=own.measure, tickformat=".0%")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category", ticklabelstandoff=6)
    title = f"{own.measure[0].upper()}{own.measure[1:]} by class"
    worst = min(places, key=lambda place: float(own.classes[place].nan_to_num(2)))
    which = (
        f" These are {len(places)} of {left_out + len(places)} classes: where the networks differ most, or the worst."
    )
    return Chart(
        layout(figure, 130 + 24 * len(places)),
        f"{title} over the validation images, in brackets how many {own.counted} it has. The worst of "
        f"{own_name(run)} is {run.examined.classes[worst]}, {float(own.classes[worst]):.1%}.{which if left_out > 0 else ''}",
        title,
    )


def confusion(run: Run) -> Chart | None:
    """What the run's student takes each class for: a matrix, or of many classes the pairs that are confused most."""
    found = judged(run)
    if run.examined is None or not found or (pairs := found[own_name(run)].confused) is None:
        return None
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    if len(run.examined.classes) > MOST_CELLS:
        return _pairs(run, wrong[:MOST_CONFUSED]) if len(wrong) else None
    names = [escape(name) for name in run.examined.classes]
    size = max(len(names), int(pairs[:, 1].max()) + 1)
    counts = np.zeros((len(names), size))
    for true, taken, count in pairs.tolist():
        counts[true, taken] = count
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    columns = [*names, *(f"class {label}" for label in range(len(names), size))]
    few = size <= 12
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=columns,
            y=names,
            customdata=counts,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            text=counts if few else None,
            texttemplate="%{text:.3~s}" if few else None,
            colorbar={"title": "share", "thickness": 12, "tickformat": ".0%"},
            hovertemplate="%{y} taken for %{x}: %{customdata:,} (%{z:.1%})<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="found", type="category", automargin=True)
    figure.update_yaxes(title_text="true", type="category", autorange="reversed", automargin=True)
    return Chart(
        layout(figure, 200 + 22 * len(names)), _most_confused(run, wrong), f"Confusion matrix of {own_name(run)}"
    )


def _most_confused(run: Run, wrong: Tensor) -> str:
    assert run.examined is not None
    counted = judged(run)[own_name(run)].counted
    said = [
        f"{run.examined.classes[true]} for {_class(run, taken)} ({count:,})"
        for true, taken, count in wrong[:3].tolist()
    ]
    told = f"The most frequent mistakes: it takes {', '.join(said)}." if said else "It makes no mistake."
    return f"Rows are true classes, columns the classes that were found; the numbers are {counted}. {told}"


def _class(run: Run, label: int) -> str:
    assert run.examined is not None
    names = run.examined.classes
    return names[label] if label < len(names) else f"class {label}"


def _pairs(run: Run, wrong: Tensor) -> Chart:
    """Bars of the pairs that the run's student confuses most, beside the other networks' counts of these."""
    found = judged(run)
    names = [f"{escape(_class(run, true))} for {escape(_class(run, taken))}" for true, taken, _ in wrong.tolist()]
    figure = go.Figure()
    for role, each in found.items():
        if each.confused is None:
            continue
        known = {(true, taken): count for true, taken, count in each.confused.tolist()}
        counts = [known.get((true, taken), 0) for true, taken, _ in wrong.tolist()]
        figure.add_bar(y=names, x=counts, name=escape(role), orientation="h", marker_color=_marks(role)[0])
    counted = found[own_name(run)].counted
    figure.update_xaxes(title_text=counted)
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    first = f"{_class(run, int(wrong[0, 0]))} for {_class(run, int(wrong[0, 1]))} ({int(wrong[0, 2]):,} {counted})"
    return Chart(
        layout(figure, 140 + 30 * len(names)),
        f"The pairs of classes that {own_name(run)} confuses most, of {len(found[own_name(run)].classes)} classes: it takes "
        f"{first} most often.",
        "Most confused classes",
    )


def reliability(run: Run) -> Chart | None:
    """How often each network is right by how sure it is, with its calibration error."""
    known = {role: each.bins for role, each in judged(run).items() if each.bins is not None}
    if not known:
        return None
    figure = go.Figure()
    said = []
    for role, bins in known.items():
        there = bins[bins[:, 0] > 0]
        shade, _ = _marks(role)
        figure.add_scatter(
            x=(there[:, 1] / there[:, 0]).numpy(),
            y=(there[:, 2] / there[:, 0]).numpy(),
            customdata=there[:, 0].numpy(),
            hovertemplate="sure by %{x:.1%}, right in %{y:.1%} of %{customdata:,}",
            name=escape(role),
            mode="lines+markers",
            line={"color": shade},
            marker={"size": (5 + 9 * (there[:, 0] / bins[:, 0].max()).sqrt()).numpy()},
        )
        over = float((bins[:, 1] - bins[:, 2]).sum())
        way = "" if math.isclose(over, 0, abs_tol=1e-9) else f", too {'sure' if over > 0 else 'unsure'} on average"
        said.append(f"{role} {calibration_error(bins):.1%}{way}")
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": BASELINE}, hoverinfo="skip", showlegend=False
    )
    figure.update_xaxes(title_text="confidence", tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(title_text="accuracy", tickformat=".0%", range=[0, 1.05])
    return Chart(
        layout(figure, 380),
        "On the dotted line a network is right as often as it says; below it, it is too sure of itself. Larger dots stand "
        f"for more predictions. Expected calibration error (ECE, 15 bins): {'; '.join(said)}.",
        "Calibration",
    )

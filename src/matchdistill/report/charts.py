"""What all charts of the pages share: a figure with its title and the sentence that says what is to be seen in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import unescape
from typing import Any, NamedTuple

import plotly.graph_objects as go

# Okabe and Ito's, which are told apart with any colour vision; their yellow is too pale on white, black on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#a0522d")
BASELINE = "#7f7f7f"  # the student alone, and lines of reference
TEACHER = "#009e73"

TERMS = {
    "churn": "At a refresh the matching is solved anew. Churn is the share of teacher channels that then belong to "
    "another student channel. It should fall as the student settles.",
    "features": "The distillation loss: how far the student's feature maps are from the teacher's matched ones.",
    "matching cost": "The mean squared distance between the normalised maps of matched channels: 0 is the same pattern, "
    "2 an unrelated one.",
    "margin": "How far below zero a target value may go before the loss ignores it.",
    "calibration": "Whether the network is right as often as it says. ECE is the mean distance between the two.",
    "ignores": "Where student and target are both below the margin, the activation sets both to zero: the loss has "
    "nothing to teach there.",
}  # words in the titles of charts: what their tooltips say


class Chart(NamedTuple):
    """A figure, its text alternative, and its title."""

    figure: go.Figure
    caption: str
    title: str = ""


def colour(number: int) -> str:
    """Of a series."""
    return COLOURS[number % len(COLOURS)]


def layout(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"}
    top = 48 if len(figure.data) > 1 or layout else 16
    return figure.update_layout(height=height, margin={"l": 60, "r": 16, "t": top, "b": 48}, legend=legend, **layout)


def zoomed(series: Iterable[Sequence[float]], *lines: float) -> list[float] | None:
    """The range of an axis that shows where curves differ: their later two thirds, and lines of reference.

    Examples:
        >>> zoomed([[0.1, 0.8, 0.9], [0.0, 0.7, 0.8]])
        [0.69, 0.91]
    """
    later = [value for values in series for value in values[len(values) // 3 :]] + list(lines)
    if not later:
        return None
    least, most = min(later), max(later)
    room = 0.05 * (most - least) or 0.05 * abs(most) or 0.05
    return [round(least - room, 12), round(most + room, 12)]


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

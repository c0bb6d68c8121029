"""What all charts of the pages share: a figure with the sentence that says what is to be seen in it."""

from __future__ import annotations

from html import unescape
from typing import Any, NamedTuple

import plotly.graph_objects as go

# Okabe and Ito's, which are told apart with any colour vision; their yellow is too pale on white, black on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")


class Chart(NamedTuple):
    """A figure and its text alternative."""

    figure: go.Figure
    caption: str


def colour(number: int) -> str:
    """Of a series."""
    return COLOURS[number % len(COLOURS)]


def layout(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"}
    top = 48 if len(figure.data) > 1 or layout else 16
    return figure.update_layout(height=height, margin={"l": 60, "r": 16, "t": top, "b": 48}, legend=legend, **layout)


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

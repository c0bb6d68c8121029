"""Charts of what is matched at one position of a run."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from matchdistill.aligned import AlignedPosition
from matchdistill.refreshed import RefreshedPosition
from matchdistill.report.charts import COLOURS, Chart, colour, layout
from matchdistill.report.runs import Run
from matchdistill.runs.evidence import most_similar_first

WHEN = {
    "first": "before training, at the first refresh",
    "last": "at the last refresh",
    "final": "after training, by the matching in force",
}


def heats(run: Run, number: int) -> list[Chart]:
    """The costs of a position with the matching on the diagonal, before and after the training."""
    return [_heat(run, number, moment) for moment in run.moments]


def _heat(run: Run, number: int, moment: str) -> Chart:
    """The costs of a position with the matching on the diagonal."""
    tensors, told = run.matchings[moment]
    about, values = told["positions"][number], tensors[f"heat{number}"].float()
    students, partners = about["student channels"], _partners(about)
    columns = students if partners == AlignedPosition.partners else about["teacher channels"]
    blocks = [math.ceil(size / cells) for size, cells in zip((students, columns), values.shape, strict=True)]
    figure = go.Figure(
        go.Heatmap(
            z=values.numpy(),
            zmin=0,
            zmax=4,
            colorscale="Viridis",
            reversescale=True,
            colorbar={
                "title": "cost",
                "thickness": 12,
                "tickvals": [0, 1, 2, 3, 4],
                "ticktext": ["0 same", "1", "2 unrelated", "3", "4 opposite"],
            },
            hovertemplate="cost %{z:.2f}<extra></extra>",
        )
    )
    _outline(figure, tensors[f"index{number}"], tensors[f"similarity{number}"].float(), columns)
    figure.update_xaxes(title_text=f"{columns} {partners}", showticklabels=False)
    figure.update_yaxes(title_text=f"{students} student channels", showticklabels=False, autorange="reversed")
    when = WHEN[moment]
    each = "" if max(blocks) == 1 else f" Each cell is the mean of up to {blocks[0]} x {blocks[1]} pairs."
    mean = about["mean cost"]
    return Chart(
        layout(figure, 340),
        f"Costs {when}: 0 is the same pattern, 2 an unrelated one. Channels are in the order of the matching, which is "
        f"the diagonal, outlined in red; its mean cost is {mean:.2f}.{each}",
        f"Costs of all pairs {when.partition(',')[0]}",
    )


def _outline(figure: go.Figure, index: Tensor, similarity: Tensor, columns: int) -> None:
    """Draw a box around the cells of each row that hold its matched pairs.

    Args:
        figure: with the costs as a heat map.
        index: the teacher channels (Cs, G) of each student channel.
        similarity: by which the rows are ordered (Cs,).
        columns: how many channels the columns are of.
    """
    rows, width = figure.data[0].z.shape
    ends = (index[most_similar_first(similarity)] >= 0).sum(1).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    x: list[float | None] = []
    y: list[float | None] = []
    for row in range(rows):
        first, last = row * len(ends) // rows, -(-(row + 1) * len(ends) // rows) - 1
        left, right = (width * place / columns - 0.5 for place in (starts[first], ends[last]))
        if right > left:
            x += [left, right, right, left, left, None]
            y += [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5, None]
    line = {"color": "#ff3b30", "width": 1}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def similarity(run: Run, number: int) -> list[Chart]:
    """The similarity of every student channel to its group, before and after the training."""
    figure = go.Figure()
    moments = [(name, run.matchings[name]) for name in run.moments]
    partners = _partners(moments[-1][1][1]["positions"][number])
    order = most_similar_first(moments[-1][1][0][f"similarity{number}"].float())
    said = []
    for place, (moment, (tensors, _)) in enumerate(moments):
        values, index = tensors[f"similarity{number}"].float(), tensors[f"index{number}"]
        when = WHEN[moment].partition(",")[0]
        figure.add_scatter(
            y=values[order].numpy(),
            customdata=[f"student channel {own}<br>{_members(index[own], partners)}" for own in order.tolist()],
            hovertemplate="%{y:.2f}<br>%{customdata}",
            name=when,
            mode="markers",
            marker={"size": 5, "color": colour(place)},
        )
        known = values[values.isfinite()]
        said.append(f"{when} {known.min():.2f}, {known.median():.2f} and {known.max():.2f}")
    figure.update_xaxes(title_text="student channels, the most similar first", showticklabels=False)
    figure.update_layout(yaxis_title="cosine")
    chart = Chart(
        layout(figure, 320),
        f"Mean cosine of each student channel to its {partners}; least, median and most: " + "; ".join(said) + ".",
        "Similarity of matched channels",
    )
    return [chart]


def _partners(about: dict[str, Any]) -> str:
    """What student channels are paired with at a position, as runs of earlier versions do not say."""
    return str(about.get("partners", RefreshedPosition.partners))


def _members(index: Tensor, partners: str) -> str:
    members = [str(member) for member in index.tolist() if member >= 0]
    more = f" and {len(members) - 8} more" if len(members) > 8 else ""
    return f"{partners} {', '.join(members[:8])}{more}" if members else "nothing"


def margins(run: Run, number: int) -> list[Chart]:
    """The distribution of a position's margins."""
    tensors, told = run.matchings[run.moments[-1]]
    values = tensors[f"margin{number}"].float()
    figure = go.Figure(go.Histogram(x=values.numpy(), nbinsx=40, marker_color=COLOURS[0]))
    figure.update_layout(
        xaxis_title="margin, in the units of the teacher's features", yaxis_title="student channels", bargap=0.05
    )
    figure.update_xaxes(exponentformat="none", tickformat=".3~f")
    source = told["positions"][number]["margins"]
    origin = "measured" if source == "measured" else f"from {source}"
    chart = Chart(
        layout(figure, 300),
        f"Margins, {origin}: how far below zero the targets may go. Least {values.min():.2f}, median "
        f"{values.median():.2f}, most {values.max():.2f}.",
        "Margins",
    )
    return [chart]

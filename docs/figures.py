"""The figures of the documentation, computed by the library on scikit-learn's digits while the site is built.

`python docs/figures.py FOLDER` writes them too. Each comes for a light and for a dark page.

Axes: N images, Cs student channels, Ct teacher channels, G group, H and W positions.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from matchdistill import MatchingDistiller
from matchdistill.data import ImageData
from matchdistill.functional import (
    batchnorm_margin,
    matching_cost,
    partial_loss,
    reduce_channels,
    solve_assignment,
)
from matchdistill.matching import Matching
from matchdistill.models import small_resnet

INK = {"light": "#222222", "dark": "#e4e4e4"}
BLUE, ORANGE, GREEN, RED = "#4a90d9", "#e08a3c", "#3fa66a", "#d2566b"  # readable on both
STYLE = {
    "svg.hashsalt": "matchdistill",  # identifiers that do not change from build to build
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
}
TEACHER_WIDTH, STUDENT_WIDTH = 16, 8
EPOCHS = 6  # of the distilled student


class Run(NamedTuple):
    """A student that was distilled on digits.

    Attributes:
        student: features (N, Cs, H, W) of the second position before any distillation.
        teacher: the teacher's there (N, Ct, H, W).
        refreshes: the matchings of every refresh, before each epoch.
    """

    student: Tensor
    teacher: Tensor
    refreshes: list[list[Matching]]


@functools.cache
def run() -> Run:
    """A teacher trained on digits for three epochs, its student alone for one, then with the teacher."""
    torch.manual_seed(0)
    data = ImageData(train_limit=500, batch_size=50, augment=False)
    data.setup()
    loader = list(data.train_dataloader())
    teacher, student = small_resnet(width=TEACHER_WIDTH), small_resnet(width=STUDENT_WIDTH)
    for network, epochs in ((teacher, 3), (student, 1)):
        _train(network, loader, epochs)
    distiller = MatchingDistiller(teacher, student)
    images = torch.cat([images for images, _ in loader])
    student.eval()
    with torch.no_grad(), distiller.capture(images) as captured:
        student(images)
    features = captured.values[1].clone(), distiller.teacher_values(captured)[1].clone()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    refreshes = []
    for _ in range(EPOCHS):
        refreshes.append(distiller.refresh(loader))
        distiller.train()
        for batch, labels in loader:
            output, loss = distiller(batch)
            (F.cross_entropy(output, labels) + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Run(*features, refreshes)


def _train(network: nn.Module, loader: list[tuple[Tensor, Tensor]], epochs: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in loader:
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def assignment(ink: str) -> Figure:
    """The matching cost, and the cells that the assignment takes."""
    cost = matching_cost(run().student, run().teacher)
    index = solve_assignment(cost)
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cost.numpy(), cmap="viridis", vmin=0.5, vmax=2.5)
    students = torch.arange(len(index))[:, None].expand_as(index)
    axes.scatter(index.flatten(), students.flatten(), s=26, facecolors="white", edgecolors="black", linewidths=1)
    axes.set_xlabel(f"teacher channel ({cost.shape[1]})")
    axes.set_ylabel(f"student channel ({cost.shape[0]})")
    figure.colorbar(image, label="cost: 0 same pattern, 2 unrelated", shrink=0.8)
    return figure


def reductions(ink: str) -> Figure:
    """What a student channel sees, its two teacher channels, and what each reduction makes of them."""
    cost = matching_cost(run().student, run().teacher)
    index = solve_assignment(cost)
    best = cost.gather(1, index).mean(1).argmin()
    student, teacher, group = run().student[:1, best], run().teacher[:1], index[best][None]
    generator = torch.Generator().manual_seed(0)
    maps = {"student channel": student[0]}
    maps |= {f"teacher channel {member}": teacher[0, member] for member in group[0].tolist()}
    for name in ("amp", "max", "mean", "rd"):
        maps[name] = reduce_channels(teacher, group, name, generator)[0, 0]
    maps["sm"] = reduce_channels(teacher, solve_assignment(cost, 1)[best][None], "sm")[0, 0]
    figure = Figure(figsize=(8, 1.6), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        largest = float(values.abs().max())
        axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(name.replace(" channel", "\nchannel"), fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def partial(ink: str) -> Figure:
    """Where a margin comes from, and the loss on both sides of it."""
    scale, shift = torch.tensor([1.0]), torch.tensor([0.3])
    margin = batchnorm_margin(scale, shift)
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = torch.linspace(-3, 3.5, 261)
    density = torch.distributions.Normal(shift, scale).log_prob(values).exp()
    left.plot(values, density, color=BLUE)
    left.fill_between(values, density, where=(values < 0).numpy(), color=BLUE, alpha=0.35, linewidth=0)
    left.axvline(margin.item(), color=ORANGE)
    left.annotate(f"margin {margin.item():.2f}", (margin.item(), 0.42), color=ORANGE, ha="right", xytext=(-4, 0),
                  textcoords="offset points")  # fmt: skip
    left.set_ylim(0, 0.46)
    left.set_xlabel("teacher's value before the activation")
    left.set_ylabel("density")
    for target, color in ((1.0, GREEN), (-0.3, BLUE), (-2.0, RED)):
        losses = [partial_loss(value.view(1, 1), torch.full((1, 1), target), margin).item() for value in values]
        right.plot(values, losses, color=color, label=f"target {target:g}")
    right.set_ylim(-0.3, 9)
    right.set_xlabel("student's value")
    right.set_ylabel("partial loss")
    right.legend(frameon=False, labelcolor=ink)
    return figure


def refresh(ink: str) -> Figure:
    """How the matching settles over the refreshes."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, color in enumerate((BLUE, ORANGE, GREEN)):
        matchings = [matchings[place] for matchings in run().refreshes]
        epochs = range(len(matchings))
        label = f"position {place}"
        left.plot(epochs, [matching.mean_cost for matching in matchings], "o-", color=color, label=label)
        right.plot(epochs[1:], [matching.churn for matching in matchings[1:]], "o-", color=color, label=label)
    left.set_ylabel("mean cost of the matched pairs")
    right.set_ylabel("share of channels that moved")
    right.set_ylim(0)
    for axes in (left, right):
        axes.set_xlabel("refresh before epoch")
        axes.set_xticks(range(EPOCHS))
    right.legend(frameon=False, labelcolor=ink)
    return figure


FIGURES: dict[str, Callable[[str], Figure]] = {
    figure.__name__: figure for figure in (assignment, reductions, partial, refresh)
}


@functools.cache
def drawn() -> dict[str, bytes]:
    """All figures: file name -> SVG."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on every machine
    try:
        return {
            f"{name}-{page}.svg": _svg(figure, ink) for page, ink in INK.items() for name, figure in FIGURES.items()
        }
    finally:
        torch.set_num_threads(threads)


def _svg(figure: Callable[[str], Figure], ink: str) -> bytes:
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**STYLE, **dict.fromkeys(colors, ink)}):
        drawing = figure(ink)
        written = io.BytesIO()
        drawing.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


if __name__ == "__main__":
    for name, content in drawn().items():
        Path(sys.argv[1], name).write_bytes(content)

"""The page of runs, or of a comparison: one HTML file that needs nothing beside it.

Axes: N images, M members shown, H height, W width.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.colors
import plotly.io
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from plotly.utils import PlotlyJSONEncoder
from torch import Tensor

from matchdistill.files import atomic_write
from matchdistill.messages import cause
from matchdistill.refreshed import RefreshedPosition
from matchdistill.report import tables, verdict
from matchdistill.report.charts import TERMS, Chart, values
from matchdistill.report.gallery import compared, embedded, gallery
from matchdistill.report.judgements import against, files, own_name
from matchdistill.report.networks import networks
from matchdistill.report.runs import Run, cells
from matchdistill.runs.metrics import METRICS
from matchdistill.runs.store import CELLS, RECIPE
from matchdistill.runs.summary import Entry, teacher_value
from matchdistill.tasks.metric import Metric

REPORT = "report.html"
MOST_MAPS, MOST_POSITIONS = 12, 24  # positions of a page that are shown with maps, and at all: it is to stay small
LEVELS = 63  # of a map's colours


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of runs, side by side, or of a comparison and of those of its runs that have none.

    Args:
        folders: of the runs, finished or not, or of one comparison.
        out: the file; None: ``report.html`` in the folder, or in the working directory for several.

    Returns:
        The file.

    Raises:
        ValueError: a folder that holds neither, or a damaged one; or the file cannot be written.
    """
    if _is_comparison(folders):
        for run in cells(folders[0]):
            if run.metrics and _lacks_page(run):
                write_report([run.folder])
    text = report(folders)
    path = out or (folders[0] if len(folders) == 1 else Path()) / REPORT
    try:
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): give --out FILE") from error
    return path


def _lacks_page(run: Run) -> bool:
    """Whether a run has no page, or one from before the student alone, which it shows, was trained."""
    page = run.folder / REPORT
    if not page.exists():
        return True
    return run.alone is not None and (run.alone.folder / METRICS).stat().st_mtime > page.stat().st_mtime


def report(folders: Sequence[Path]) -> str:
    """The page as HTML; see `write_report`."""
    if _is_comparison(folders):
        return _render("comparison", **_of(folders, lambda: _comparison(folders[0])))
    for folder in folders:
        if (folder / CELLS).is_dir():
            raise ValueError(f"{folder} is a comparison: its page is one of its own, or name its runs")
    return _render("runs", **_of(folders, lambda: _runs(folders)))


def _is_comparison(folders: Sequence[Path]) -> bool:
    return len(folders) == 1 and (folders[0] / CELLS).is_dir()


def _of(folders: Sequence[Path], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is read of folders, whose files may hold anything."""
    try:
        return read()
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{' or '.join(map(str, folders))} is damaged: {cause(error)}") from error


def _runs(folders: Sequence[Path]) -> dict[str, Any]:
    runs = [Run.of(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
        runs = [Run.of(folder, name) for folder, name in zip(folders, names, strict=True)]
    return {
        "title": " and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        "verdicts": [verdict.of_run(run) for run in runs],
        "back": runs[0].comparison if len(runs) == 1 else None,
        "networks": networks(runs),
        "charts": _shown([chart(runs) for chart in tables.RUNS]),
        "runs": [_details(run, sum(len(each.positions) for each in runs)) for run in runs],
    }


def _comparison(folder: Path) -> dict[str, Any]:
    runs = cells(folder)
    metric = runs[0].comparing
    entries = verdict.entries_of(runs)
    best = verdict.best_of(entries, metric)
    top = None if best is None or best.value is None else best.value.mean
    rows = [
        {
            "method": entry.method,
            "best": len(entries) > 1 and entry.value is not None and entry.value.mean == top,
            "cells": [] if metric is None else entry.cells(metric),
            "seconds": f"{entry.seconds:.0f}",
        }
        for entry in entries
    ]
    links = [
        {
            "name": run.name,
            "path": (run.folder / REPORT).relative_to(folder).as_posix() if (run.folder / REPORT).is_file() else None,
            "value": _value(run, metric),
        }
        for run in runs
    ]
    teacher = None if metric is None else teacher_value([run.metrics for run in runs if run.metrics], metric)
    return {
        "title": folder.resolve().name,
        "verdicts": [verdict.of_comparison(runs)],
        "metric": metric.label if metric else None,
        "teacher": None if metric is None or teacher is None else metric.shown(teacher),
        "rows": rows,
        "charts": _shown([chart(runs) for chart in tables.COMPARISON]),
        "classes": _classes(runs, verdict.best_of([each for each in entries if each.method != "none"], metric)),
        "pictures": compared(runs),
        "links": links,
        "recipe": (folder / RECIPE).read_text(encoding="utf-8"),
        "environment": next((run.environment for run in runs if run.environment), {}),
    }


def _classes(runs: Sequence[Run], best: Entry | None) -> dict[str, Any] | None:
    """What the first student of the best method makes of the validation images; None: nothing is known of it."""
    found = (run for run in runs if best and run.method == best.method and run.metrics and run.examined)
    run = next(found, None)
    return None if run is None else _judged(run)


def _judged(run: Run) -> dict[str, Any]:
    """What a page shows of what a run's networks make of the validation images."""
    return {
        "name": run.name,
        "role": own_name(run),
        "charts": _shown([chart(run) for chart in tables.CLASSES]),
        "against": against(run),
        "graded": "" if run.examined is None else run.examined.roles["student"].graded,
    }


def _value(run: Run, metric: Metric | None) -> str:
    """What a run came to, in a few words."""
    if run.metrics is None:
        return "not finished"
    return "finished" if metric is None else metric.shown(run.metrics.student[metric.name])


def _details(run: Run, positions: int) -> dict[str, Any]:
    """What the page shows of one run, if the runs of the page have so many positions together."""
    return {
        "name": run.name,
        "learned": run.learned,
        "notes": run.notes,
        "judged": _judged(run),
        "files": files(run),
        "charts": _shown([chart(run) for chart in tables.RUN]),
        "positions": [
            {
                "name": f"{each['teacher']} ({each['teacher channels']} channels) → {each['student']} "
                f"({each['student channels']})",
                "charts": _shown([each for chart in tables.POSITION for each in chart(run, number)]),
                "channels": _channels(run, number) if positions <= MOST_MAPS else [],
            }
            for number, each in enumerate(run.positions if positions <= MOST_POSITIONS else ())
        ],
        "left_out": positions > MOST_MAPS,
        "pictures": gallery(run),
        "recipe": (run.folder / RECIPE).read_text(encoding="utf-8"),
        "environment": run.environment,
    }


def _channels(run: Run, number: int) -> list[dict[str, Any]]:
    """The best and the worst matched student channels of a position, with their maps as images."""
    if run.pictures is None or number >= len(run.pictures[1]["positions"]):
        return []
    tensors, told = run.pictures
    about = told["positions"][number]
    first = about.get("first", RefreshedPosition.first_members)  # earlier versions do not say it
    student, members, target = (tensors[f"{name}{number}"].float() for name in ("student", "members", "target"))
    found = []
    for place, channel in enumerate(about["channels"]):
        group, similarity = about["members"][place], about["similarity"][place]
        heads = [f"student channel {channel}", "reduced target", *(f"teacher channel {member}" for member in group)]
        maps = [student[place], target[place], *members[place]]
        left_out = about["group"] - len(group)
        found.append(
            {
                "name": f"{channel}, cosine {similarity:.2f}",
                "more": f", the {len(group)} {first} of {about['group']}" if left_out else "",
                "rows": [
                    [
                        (f"{head}, image {image + 1}", _map(maps_[image]))
                        for head, maps_ in zip(heads, maps, strict=True)
                    ]
                    for image in range(student.shape[1])
                ],
                "heads": heads,
            }
        )
    return found


@functools.cache
def _palette() -> list[int]:
    """Blue for negative values, white for zero, red for positive ones, as bytes."""
    places = [level / (LEVELS - 1) for level in range(LEVELS)]
    colours = plotly.colors.sample_colorscale("RdBu_r", places, colortype="tuple")
    return [round(255 * part) for colour in colours for part in colour]


def _map(values: Tensor) -> str:
    """A map (H, W), relative to its largest magnitude, as an image."""
    relative = values / values.abs().max().clamp_min(1e-6)
    image = Image.fromarray(((relative + 1) * (LEVELS // 2)).round().byte().numpy(), "P")
    image.putpalette(_palette())
    return embedded(image, "PNG")


def _shown(found: Sequence[Chart | None]) -> list[dict[str, Any]]:
    """Charts as the page takes them."""
    shown_ = []
    for chart in found:
        if chart is not None:
            figure = chart.figure.to_plotly_json()
            figure["layout"].pop("template", None)  # the page has its own
            shown_.append(
                {
                    "figure": json.dumps(figure, cls=PlotlyJSONEncoder).replace("<", "\\u003c"),
                    "height": chart.figure.layout.height,
                    "caption": chart.caption,
                    "title": chart.title,
                    "values": values(chart.figure),
                }
            )
    return shown_


@functools.cache
def _library() -> str:
    """Plotly's script, compressed: the browser unpacks it."""
    script = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, mtime=0)).decode()


@functools.cache
def _templates() -> str:
    """Plotly's templates for light and dark, on the page's own background."""
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    found = {}
    for name in ("white", "dark"):
        template = plotly.io.templates[f"plotly_{name}"].to_plotly_json()
        found[name] = {"layout": {**template["layout"], **clear}}
    return json.dumps(found, cls=PlotlyJSONEncoder).replace("<", "\\u003c")


def _render(kind: str, **content: Any) -> str:
    pages = Environment(
        loader=PackageLoader("matchdistill", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False)
    assets = {"library": _library(), "templates": _templates(), "terms": TERMS}
    return pages.get_template("page.html").render(kind=kind, **assets, **content)

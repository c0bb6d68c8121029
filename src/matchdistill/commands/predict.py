"""The command predict."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matchdistill.commands.options import add_trust, path_option, plain_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from matchdistill.runs.predict import Predictor
    from matchdistill.tasks.predicting import Found

MOST_COLUMNS = 12  # of the table on the terminal
SHOWN_ROWS = 20


def predict(arguments: Sequence[str]) -> None:
    """Say what a student finds in images of your own: as a table, CSV, JSON or drawn on the images."""
    options = _parser().parse_args(list(arguments))
    from matchdistill.runs.predict import FORMATS, Predictor, drawn_paths, find_pictures, mask_paths, write_found

    if options.out is not None and options.out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {options.out}: expected a name that ends in {' or '.join(FORMATS)}")
    paths = find_pictures(options.paths)
    if options.draw is not None:
        drawn_paths(paths, options.draw)  # none is one of the images
    if options.masks is not None:
        mask_paths(paths, options.masks)
    predictor = Predictor(
        options.run,
        top=options.top,
        batch_size=options.batch_size,
        device=options.device,
        workers=options.workers,
        skip_corrupt=options.skip_corrupt,
        max_pixels=options.max_pixels,
        trust=options.trust,
    )
    started = time.perf_counter()
    found = _watched(predictor, paths)
    seconds = time.perf_counter() - started
    if options.out is not None:
        write_found(options.out, predictor.predicting, found)
    if options.draw is not None:
        predictor.draw(found, options.draw)
    if options.masks is not None:
        predictor.write_masks(found, options.masks)
    _show(predictor, found)
    skipped = f", {len(paths) - len(found)} skipped" if len(found) < len(paths) else ""
    print(f"{len(found)} images in {seconds:.2f} s, {len(found) / seconds:.0f} images per second{skipped}")
    for place in (options.out, options.draw, options.masks):
        if place is not None:
            print(place)


def _parser() -> ArgumentParser:
    parser = plain_parser("matchdistill predict", predict)
    parser.add_argument(
        "run", type=path_option, help="a run's folder, an exported one, or a .safetensors, .onnx or .pt2 file in either"
    )
    parser.add_argument(
        "paths", type=path_option, nargs="+", help="images, folders of images or of a video's frames, or patterns"
    )
    parser.add_argument("--out", type=path_option, default=None, help="a .csv or .json file; detectors: COCO's results")
    parser.add_argument("--draw", type=path_option, default=None, help="a folder for the images with what was found")
    parser.add_argument("--masks", type=path_option, default=None, help="a folder for PNGs of the class of every pixel")
    parser.add_argument(
        "--top", type=int, default=None, help="classes per image, default 1; boxes, or classes of pixels, default all"
    )
    parser.add_argument(
        "--batch_size", type=int, default=None, help="images at a time; default: 32, or 1 where images keep their sizes"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; 0: this one")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--max_pixels", type=int, default=None, help="the most of an image; default: 179 million")
    add_trust(parser)
    return parser


def _watched(predictor: Predictor, paths: Sequence[str]) -> list[Found]:
    """What is found, with a bar of the progress on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from matchdistill.messages import console

    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("predict", total=len(paths))
        return predictor(paths, lambda count: bar.advance(task, count))


def _show(predictor: Predictor, found: Sequence[Found]) -> None:
    """Print a table of the first rows."""
    from rich.table import Table

    from matchdistill.messages import console, printable

    rows = [_narrow(row) for own in found for row in own.rows()]
    more = len(rows) - SHOWN_ROWS
    table = Table(caption=f"and {more:,} more rows" if more > 0 else None)
    for name in map(str, _narrow(predictor.predicting.columns)):
        table.add_column(name, overflow="fold")
    for row in rows[:SHOWN_ROWS]:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in row))
    console().print(table)


def _narrow(row: Sequence[str | float]) -> list[str | float]:
    """A row as the terminal shows it: of many numbers the first ones, and how many more there are."""
    if len(row) <= MOST_COLUMNS:
        return list(row)
    return [*row[: MOST_COLUMNS - 1], f"{len(row) - MOST_COLUMNS + 1} more"]

"""A recipe under several methods and seeds: which method helps, by how much, and how sure that is."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from matchdistill import ending
from matchdistill.files import atomic_write, write_json
from matchdistill.locking import held
from matchdistill.messages import as_sentence, attempt, duration
from matchdistill.methods import parse_method
from matchdistill.report.page import write_report
from matchdistill.runs.build import build_module
from matchdistill.runs.machine import machine_trainer
from matchdistill.runs.metrics import METRICS, SCHEMA, RunMetrics, comparing, read_metrics
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import CELLS, CHECKPOINT, WEIGHTS, check_folder, claim
from matchdistill.runs.summary import Entry, summarise, teacher_value
from matchdistill.runs.train import fit, look_at
from matchdistill.runs.weak import TeacherCheck

TABLE = "metrics.csv"


@dataclass(frozen=True)
class Compared:
    """What a comparison came to.

    Attributes:
        config: of its recipe.
        summary: what each method came to.
        runs: all runs, by seed and method.
    """

    config: dict[str, Any]
    summary: list[Entry]
    runs: list[RunMetrics]

    def plain(self) -> dict[str, Any]:
        """As `metrics.json` has it."""
        metric = comparing(self.runs)
        return {
            "schema": SCHEMA,
            "recipe": self.config,
            "summary": [entry.plain(metric) for entry in self.summary],
            "runs": [run.plain() for run in self.runs],
        }


class Cell(NamedTuple):
    """One run of the grid."""

    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Its folder inside that of the comparison."""
        return Path(CELLS) / self.method / f"seed{self.seed}"


def compare(
    recipe: Recipe, out: Path, methods: Sequence[str], seeds: int, jobs: int = 1, terminal: Console | None = None
) -> Compared:
    """Run the recipe under every method and seed, and summarise.

    The runs of a seed start from the same weights and see the same images in the same order for as long, whatever their
    method. Finished runs are kept: called again after a crash, it goes on with the rest.

    Args:
        recipe: what to run.
        out: folder of the comparison; each run has its own in it, the teacher too.
        methods: distillation methods.
        seeds: runs per method.
        jobs: runs at a time, each in a process with its share of the cores.
        terminal: where to report.

    Returns:
        The summary by method, and the metrics of every run, which `metrics.json` holds too.

    Raises:
        ValueError: `out` holds runs of another recipe, or another process writes there.
        KeyboardInterrupt, Terminated: it was told to end, by Ctrl-C or SIGTERM.
        RuntimeError: runs failed; the others are done and kept.
    """
    terminal = terminal or Console(quiet=True)
    methods = list(dict.fromkeys(methods))
    if jobs > 1 and recipe.trainer.devices != 1:
        raise ValueError(
            f"{jobs} jobs on {recipe.trainer.devices} devices each: compare with --jobs 1 or on one device"
        )
    with ending.orderly(), held(out):
        return _compare(recipe, out, methods, seeds, jobs, terminal)


def prepare(recipe: Recipe, out: Path, methods: Sequence[str], seeds: int) -> tuple[list[Cell], bool]:
    """Make a folder that of a comparison, if all that it is to run can be run.

    Returns:
        The runs, and whether a teacher has to be there before them.

    Raises:
        ValueError: a run cannot be done, or the folder holds something else; nothing is written then.
    """
    check_folder(recipe, out, resume=True, other=CHECKPOINT)
    for method in methods:  # before anything is trained or written
        build_module(Recipe.of(recipe.config, distillation__method=method))
    recipe.data.check_shares(1)
    trains_teacher = any(method != "none" for method in methods) and recipe.teacher.training.epochs > 0
    if trains_teacher:
        recipe.for_teacher().data.check_shares(1)
    claim(recipe, out)
    (out / CELLS).mkdir(exist_ok=True)  # it tells a comparison from a run
    return [Cell(method, recipe.seed + number) for number in range(seeds) for method in methods], trains_teacher


def finish(config: dict[str, Any], methods: Sequence[str], runs: list[RunMetrics], out: Path) -> Compared:
    """Write what a comparison came to, with its page."""
    compared = Compared(config, summarise(runs, methods), runs)
    write_json(out / METRICS, compared.plain())
    atomic_write(out / TABLE, lambda path: _write_csv(path, runs))
    attempt("write the page", lambda: write_report([out]))
    return compared


def _compare(recipe: Recipe, out: Path, methods: Sequence[str], seeds: int, jobs: int, terminal: Console) -> Compared:
    """The comparison itself, in a folder that is this process's."""
    cells, trains_teacher = prepare(recipe, out, methods, seeds)
    if trains_teacher:
        terminal.print(
            f"teacher: {recipe.teacher.name}, {recipe.teacher.training.epochs} epochs", highlight=False, markup=False
        )
        with _threads(jobs):
            result = train_teacher(recipe, out, quiet=not terminal.is_terminal)
        terminal.print(f"teacher: {told(result)}", highlight=False)
    if (weak := _weak_teacher(recipe, methods, out)) is not None:
        terminal.print(f"warning: {weak}", highlight=False, soft_wrap=True)
    results: dict[Cell, RunMetrics] = {}
    failures: dict[str, list[str]] = {}  # what went wrong -> where
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        task, started = progress.add_task("runs", total=len(cells)), time.monotonic()
        for number, (cell, outcome) in enumerate(_run(recipe.config, cells, out, jobs)):
            progress.advance(task)
            if isinstance(outcome, str):
                failures.setdefault(outcome, []).append(f"{cell.method} seed {cell.seed}")
                terminal.print(
                    f"{cell.method}, seed {cell.seed}: {outcome}", highlight=False, markup=False, soft_wrap=True
                )
                continue
            results[cell] = outcome
            terminal.print(f"{cell.method}, seed {cell.seed}: {told(outcome)}", highlight=False)
            passed, left = time.monotonic() - started, len(cells) - 1
            if number == 0 and left and passed > 1:  # a run that was done before says nothing
                terminal.print(
                    f"about {duration(passed * -(-left // jobs))} for {left} more run{'s' * (left > 1)}",
                    highlight=False,
                )
    if failures:
        attempt("write the page", lambda: write_report([out]))
        causes = "; ".join(f"{outcome} ({', '.join(places)})" for outcome, places in failures.items())
        kept = f", the others are kept in {out}" if results else ""
        failed = len(cells) - len(results)
        raise RuntimeError(f"{failed} of {len(cells)} runs failed{kept}; the same command continues them: {causes}")
    runs = [results[cell] for cell in cells]
    compared = finish(recipe.config, methods, runs, out)
    show_summary(compared, terminal)
    return compared


def _weak_teacher(recipe: Recipe, methods: Sequence[str], out: Path) -> str | None:
    """Why the teacher is not worth learning from, measured once for all runs; None: it is.

    Raises:
        ValueError: it is not, and the recipe does not allow that.
    """
    # A method with the teacher's output says more of its head than one without.
    taught = sorted((each for each in methods if each != "none"), key=lambda each: not parse_method(each).kd)
    cells = [Cell(method, recipe.seed) for method in taught]
    if all((out / cell.folder / METRICS).is_file() for cell in cells):  # also where there are none
        return None
    own = recipe_of(recipe.config, cells[0], out)
    check = TeacherCheck(own, build_module(own), out)
    found = check.found(machine_trainer(recipe.trainer, logger=False, max_epochs=0).strategy.root_device)
    attempt("keep what the teacher came to", check.keep)
    return found


def train_teacher(recipe: Recipe, out: Path, quiet: bool = True) -> RunMetrics:
    """The teacher of all runs of a comparison, unless it is there already."""
    if read_metrics(out / "teacher") is None:
        look_at(recipe.data)
    return fit(recipe.for_teacher(), out / "teacher", resume=True, quiet=quiet)


def told(run: RunMetrics) -> str:
    metric = comparing([run])
    measured = "" if metric is None else f"{metric.label} {metric.shown(run.student[metric.name])}, "
    return f"{measured}{run.seconds:.0f} s"


def _run(
    config: dict[str, Any], cells: Sequence[Cell], out: Path, jobs: int
) -> Iterator[tuple[Cell, RunMetrics | str]]:
    """The metrics of every cell as it finishes, or what went wrong in it."""
    if jobs == 1:
        for cell in cells:
            yield cell, run_cell(config, cell, out)
        return
    context = multiprocessing.get_context("spawn")
    with _threads(jobs):
        plain = warnings.formatwarning is as_sentence
        pool = ProcessPoolExecutor(jobs, context, _start_worker, (torch.get_num_threads(), plain))
    try:
        futures = {pool.submit(run_cell, config, cell, out): cell for cell in cells}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                yield futures[future], "a process of the comparison was killed (out of memory?)"
            else:
                yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"
    except BaseException:
        # Interrupted: a worker would go on with the next run. What it leaves is whole, files are replaced at once.
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise
    pool.shutdown()


def _start_worker(threads: int, plain: bool) -> None:
    """Set up a process of the pool, whose warnings look as its parent's; it ends with that, even where it is killed."""
    if plain:
        warnings.formatwarning = as_sentence
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all of a terminal's processes; the parent ends this one
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """One job's share of the threads. Their number changes the sums a little, so the teacher gets the same as the runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recipe_of(config: dict[str, Any], cell: Cell, out: Path) -> Recipe:
    """The recipe of a run of the grid, with the teacher that was trained for all of them."""
    recipe = Recipe.of(config, seed=cell.seed, distillation__method=cell.method)
    if recipe.distillation.needs_teacher and recipe.teacher.training.epochs:
        recipe = recipe.with_trained_teacher(out / "teacher" / WEIGHTS)
    return recipe


def run_cell(config: dict[str, Any], cell: Cell, out: Path) -> RunMetrics | str:
    """What a run came to, or what went wrong in it."""
    try:
        return fit(recipe_of(config, cell, out), out / cell.folder, resume=True, quiet=True)
    except (Exception, ending.OutOfTime) as error:  # whatever it is, the other runs go on
        return f"{type(error).__name__}: {error}"


def show_summary(compared: Compared, terminal: Console) -> None:
    """Print the summary, and what it tells in words."""
    terminal.print(summary_table(compared))
    metric = comparing(compared.runs)
    for entry in compared.summary:
        if metric is not None and (told := entry.conclusion(metric)) is not None:
            terminal.print(f"{entry.method}: {told}", highlight=False, soft_wrap=True)


def summary_table(compared: Compared) -> Table:
    """The summary for the terminal."""
    metric = comparing(compared.runs)
    if metric is None:
        table = Table("method")
    else:
        teacher = teacher_value(compared.runs, metric)
        title = "" if teacher is None else f"teacher: {metric.label} {metric.shown(teacher)}"
        table = Table(
            "method", title=title, caption="± half of the 95% interval over seeds; differences paired by seed"
        )
        for heading in (metric.label, "to none", "gap recovered"):
            table.add_column(heading, justify="right")
    table.add_column("seconds per run", justify="right")
    for entry in compared.summary:
        measured = [] if metric is None else entry.cells(metric)
        table.add_row(entry.method, *measured, f"{entry.seconds:.0f}")
    return table


def _write_csv(path: Path, runs: Sequence[RunMetrics]) -> None:
    metric = comparing(runs)
    names = [] if metric is None else [metric.name]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *names, *(f"teacher_{name}" for name in names), "seconds"])
        for run in runs:
            values = [of.get(name, "") for of in (run.student, run.teacher) for name in names]
            writer.writerow([run.method, run.seed, *values, run.seconds])

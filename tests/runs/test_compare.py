import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from matchdistill.runs import compare as module
from matchdistill.runs.compare import Cell, Compared, compare, show_summary, summary_table
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.summary import summarise
from matchdistill.runs.train import fit
from records import run_of, runs_of, timeless

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

TEACHER = ("--teacher.weights=null", "--teacher.training.epochs=1")


@pytest.fixture
def fitted(monkeypatch):
    """The folders of runs that were really run, last first to name."""
    folders = []

    def record(recipe, out, resume=False, quiet=False):
        if not (out / "metrics.json").exists():
            folders.append(out.name if out.name == "teacher" else f"{out.parent.name}/{out.name}")
        return fit(recipe, out, resume, quiet)

    monkeypatch.setattr(module, "fit", record)
    return folders


def shown(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_grid(tiny, tmp_path, fitted):
    out, methods = tmp_path / "out", ["none", "kd", "mgd-amp+kd"]
    console = Console(width=200, record=True, file=io.StringIO())
    report = compare(tiny(*TEACHER, "--seed=3"), out, methods, 2, terminal=console)
    assert fitted == ["teacher", *(f"{method}/seed{seed}" for seed in (3, 4) for method in methods)]
    assert report.plain() == json.loads((out / "metrics.json").read_text())
    assert report.config["seed"] == 3
    assert [(run.method, run.seed) for run in report.runs] == [(m, s) for s in (3, 4) for m in methods]
    for run in report.runs:
        folder = out / "cells" / run.method / f"seed{run.seed}"
        assert run == read_metrics(folder)
        assert (folder / "student.safetensors").exists()
        assert not (folder / "teacher").exists()
    assert report.summary == summarise(report.runs, methods)
    teachers = [run.teacher["top1"] for run in report.runs if run.method != "none"]
    trained = json.loads((out / "teacher" / "metrics.json").read_text())["student"]["top1"]
    assert teachers == pytest.approx([trained] * 4)
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["seed"])) for row in rows] == [(m, s) for s in (3, 4) for m in methods]
    for row, run in zip(rows, report.runs, strict=True):
        assert float(row["top1"]) == run.student["top1"]
        assert row["teacher_top1"] == str(run.teacher.get("top1", ""))
        assert float(row["seconds"]) == run.seconds
    text = console.export_text()
    for part in ("teacher: matchdistill.models:small_resnet, 1 epochs", "kd, seed 4: top-1", "gap recovered"):
        assert part in text


def test_the_same_command_without_a_comparison(tiny, tmp_path):
    """A cell is an ordinary run of the recipe with that method and seed."""
    compare(tiny(), tmp_path / "out", ["mgd-amp"], 1)
    fit(tiny("--distillation.method=mgd-amp"), tmp_path / "run", quiet=True)
    first, second = (
        load_file(tmp_path / folder / "student.safetensors") for folder in ("out/cells/mgd-amp/seed0", "run")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_goes_on_cell_by_cell(tiny, tmp_path, fitted, monkeypatch):
    out = tmp_path / "out"
    recipe = tiny(*TEACHER)
    first = compare(recipe, out, ["none", "kd"], 2)
    assert len(fitted) == 5
    fitted.clear()
    for name in ("metrics.json", "last.ckpt"):
        (out / "cells/kd/seed1" / name).unlink()
    (out / "metrics.json").unlink()
    second = compare(tiny(*TEACHER), out, ["none", "kd"], 2)
    assert fitted == ["kd/seed1"]
    assert timeless(first.runs) == timeless(second.runs)
    fitted.clear()
    compare(tiny(*TEACHER), out, ["mgd-sm", "kd", "none"], 3)
    assert fitted == ["mgd-sm/seed0", "mgd-sm/seed1", "mgd-sm/seed2", "kd/seed2", "none/seed2"]
    fitted.clear()
    monkeypatch.chdir(tmp_path)
    report = compare(tiny(*TEACHER), (tmp_path / "out").relative_to(tmp_path), ["kd"], 1)
    assert fitted == []
    assert [(run.method, run.seed) for run in report.runs] == [("kd", 0)]


def test_without_a_method_that_needs_it_no_teacher_is_trained(tiny, tmp_path, fitted):
    report = compare(tiny(*TEACHER), tmp_path / "out", ["none"], 1)
    assert fitted == ["none/seed0"]
    assert report.summary[0].difference is None
    compare(tiny(*TEACHER), tmp_path / "out", ["none", "kd"], 1)
    assert fitted == ["none/seed0", "teacher", "kd/seed0"]


def test_methods_named_twice_run_once(tiny, tmp_path, fitted):
    report = compare(tiny(), tmp_path / "out", ["none", "none"], 1)
    assert fitted == ["none/seed0"]
    assert [entry.method for entry in report.summary] == ["none"]


@pytest.mark.slow
def test_jobs_change_nothing(tiny, tmp_path):
    reports = []
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        report = compare(tiny(*TEACHER), out, ["none", "mgd-rd+kd"], 2, jobs)
        reports.append([timeless(report.runs), timeless(report.summary)])
    assert reports[0] == reports[1]
    for method, seed in (("none", 0), ("mgd-rd+kd", 1)):
        first, second = (
            load_file(tmp_path / jobs / "cells" / method / f"seed{seed}" / "student.safetensors") for jobs in "12"
        )
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_a_failing_cell_among_jobs(tiny, tmp_path):
    compare(tiny(), tmp_path / "out", ["none"], 1)
    blocked = tmp_path / "out" / "cells" / "kd" / "seed0"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"^1 of 4 runs failed, the others are kept in .*: \w+Error.* \(kd seed 0\)"):
        compare(tiny(), tmp_path / "out", ["none", "kd"], 2, jobs=2)
    assert len(list((tmp_path / "out").rglob("student.safetensors"))) == 3


@pytest.mark.parametrize("error", [ValueError, FloatingPointError, OSError, TypeError, KeyError])
def test_a_failing_cell_is_reported_and_the_others_are_kept(tiny, tmp_path, monkeypatch, error):
    out = tmp_path / "out"

    def sometimes(recipe, folder, resume=False, quiet=False):
        if (recipe.distillation.method, recipe.seed) == ("kd", 0):
            raise error("bad luck")
        return fit(recipe, folder, resume, quiet)

    monkeypatch.setattr(module, "fit", sometimes)
    console = Console(width=200, record=True, file=io.StringIO())
    message = rf"1 of 4 runs failed, the others are kept in {out}; .*: {error.__name__}: '?bad luck'? \(kd seed 0\)"
    with pytest.raises(RuntimeError, match=message):
        compare(tiny(), out, ["none", "kd"], 2, terminal=console)
    assert re.search("kd, seed 0: .*bad luck", console.export_text())
    assert not (out / "metrics.json").exists()
    done = sorted(path.parent.relative_to(out / "cells").as_posix() for path in out.rglob("metrics.json"))
    assert done == ["kd/seed1", "none/seed0", "none/seed1"]
    monkeypatch.undo()
    assert len(compare(tiny(), out, ["none", "kd"], 2).runs) == 4


def test_another_recipe_is_refused(tiny, tmp_path, fitted):
    compare(tiny(), tmp_path / "out", ["none"], 1)
    with pytest.raises(ValueError, match=r"recipe.yaml differs in training: resume with the same values"):
        compare(tiny("--training.lr=0.3"), tmp_path / "out", ["none"], 1)
    with pytest.raises(ValueError, match="differs in seed"):
        compare(tiny("--seed=1"), tmp_path / "out", ["none"], 1)
    assert fitted == ["none/seed0"]


def test_runs_and_comparisons_do_not_share_a_folder(tiny, tmp_path, fitted):
    compare(tiny(), tmp_path / "grid", ["none"], 1)
    fit(tiny("--distillation.method=none"), tmp_path / "run")
    before = [(tmp_path / name / "metrics.json").read_text() for name in ("grid", "run")]
    with pytest.raises(ValueError, match="grid already holds a comparison: choose another --out"):
        fit(tiny(), tmp_path / "grid", resume=True)
    with pytest.raises(ValueError, match="run already holds a run: choose another --out"):
        compare(tiny("--distillation.method=none"), tmp_path / "run", ["none"], 1)
    assert [(tmp_path / name / "metrics.json").read_text() for name in ("grid", "run")] == before


@pytest.mark.parametrize(
    ("arguments", "methods", "message"),
    [
        ((), ["none", "kdd"], "unknown method 'kdd'"),
        (("--distillation.method=none", "--teacher.name=null", "--teacher.weights=null"), ["none", "kd"], "'kd' needs"),
        (("--distillation.taps=[[layer9, layer1]]",), ["none", "mgd-amp"], "no module 'layer9'"),
        (("--student.name=timm:resnt18",), ["none"], "did you mean 'resnet18'"),
        (
            ("--teacher.training.epochs=1", "--teacher.train_limit=9999"),
            ["kd"],
            "train_limit is 9999, but there are only",
        ),
    ],
)
def test_mistakes_are_found_before_the_first_run(tiny, tmp_path, fitted, arguments, methods, message):
    with pytest.raises(ValueError, match=message):
        compare(tiny(*arguments), tmp_path / "out", methods, 1)
    assert fitted == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("devices", [3, "auto"])
def test_jobs_of_several_processes_are_refused(tiny, tmp_path, devices):
    with pytest.raises(ValueError, match=f"2 jobs on {devices} devices each"):
        compare(tiny(f"--trainer.devices={devices}"), tmp_path / "out", ["none"], 1, jobs=2)


def test_table_of_a_single_seed():
    runs = runs_of({"none": [0.5], "kd": [0.7]})
    text = shown(summary_table(Compared({}, summarise(runs, ["none", "kd"]), runs)))
    assert "+20.00" in text
    assert " ± " not in text.replace("± half", "")


def test_table():
    runs = runs_of({"none": [0.80, 0.82], "mgd-amp+kd": [0.85, 0.86]}, teacher=0.9)
    text = shown(summary_table(Compared({}, summarise(runs, ["none", "mgd-amp+kd"]), runs)))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    none, amp = (next(line for line in lines if line.startswith(method)) for method in ("none", "mgd-amp"))
    assert none == "none 81.00 ± 12.71 2"
    assert amp == "mgd-amp+kd 85.50 ± 6.35 +4.50 ± 6.35 2"  # no share of the gap: two seeds tell nothing
    assert "teacher: top-1 90.00%" in text


def test_what_a_summary_tells_is_said_below_its_table():
    values = {"none": [0.80, 0.82, 0.81], "kd": [0.85, 0.86, 0.86], "mgd-amp": [0.80, 0.84, 0.79]}
    runs = runs_of(values, teacher=0.9)
    console = Console(width=80, record=True, file=io.StringIO())
    show_summary(Compared({}, summarise(runs, list(values)), runs), console)
    told = console.export_text()
    assert re.search(r"^kd: better than without a teacher$", told, re.MULTILINE)
    assert re.search(r"^mgd-amp: no difference can be told; ", told, re.MULTILINE)
    assert max(map(len, told.splitlines())) <= 80


def test_folders_of_cells():
    assert Cell("mgd-amp+kd", 7).folder.as_posix() == "cells/mgd-amp+kd/seed7"


def test_cells_share_all_but_method_and_seed(tiny, tmp_path, monkeypatch):
    seen = []

    def record(recipe, out, resume, quiet):
        seen.append(recipe)
        return run_of(recipe.distillation.method, recipe.seed)

    monkeypatch.setattr(module, "fit", record)
    recipe = tiny()
    compare(recipe, tmp_path / "out", ["none", "kd"], 2)
    for each, (method, seed) in zip(seen, [("none", 0), ("kd", 0), ("none", 1), ("kd", 1)], strict=True):
        assert each.config == Recipe.of(recipe.config, seed=seed, distillation__method=method).config
        assert each.data.options.seed == seed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_all_processes(how, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "matchdistill", "quickstart", "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--teacher.training.epochs", "1", "--training.epochs", "1000"],
        start_new_session=True,
        # Ignored where the tests themselves run in the background of a shell, and then by all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = out / "cells" / "none" / "seed0" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not saved.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted" in errors
    else:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "processes of the comparison are left"
        time.sleep(0.2)

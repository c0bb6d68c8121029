"""The student of a run without its teacher, trained in the same call."""

import pytest

from matchdistill.cli import main
from matchdistill.runs.alone import command_for_alone, fit_alone
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit
from records import timeless


def test_the_baseline_is_the_run_without_a_teacher(tiny, tiny_file, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["fit", str(tiny_file), "--out", str(out), "--training.epochs=1"]) == 0
    told = capfd.readouterr().out
    again = f"matchdistill fit {tiny_file} --training.epochs=1 --out {out} --resume --baseline"
    assert f"student alone: not known ({again} trains it)" in told
    assert main(again.split()[1:]) == 0  # the command that it names
    told = capfd.readouterr().out
    assert "one seed tells no difference" in told
    alone = read_metrics(out / "alone")
    assert alone.method == "none"
    other = fit(
        load_recipe(tiny_file, "--training.epochs=1", "--distillation.method=none"), tmp_path / "other", quiet=True
    )
    assert timeless([alone]) == timeless([other])
    assert (
        f"student alone: top-1 {alone.student['top1']:.2%}, distilled {read_metrics(out).student['top1']:.2%}" in told
    )
    # It is trained once.
    before = (out / "alone" / "metrics.json").stat().st_mtime_ns
    assert fit_alone(tiny("--training.epochs=1"), out, quiet=True) == alone
    assert (out / "alone" / "metrics.json").stat().st_mtime_ns == before


def test_without_a_teacher_there_is_no_baseline(tiny_file, tmp_path, capfd):
    arguments = ["fit", str(tiny_file), "--out", str(tmp_path / "run"), "--distillation.method=none", "--baseline"]
    assert main(arguments) == 2
    assert "leave it out" in capfd.readouterr().err


@pytest.mark.parametrize("out", [["--out", "old"], ["--out=old"], []])
def test_the_command_keeps_the_other_options(out, tmp_path):
    arguments = ["mine.yaml", *out, "--open", "--training.lr", "0.1"]
    command = command_for_alone(arguments, tmp_path / "my run")
    assert command == f"matchdistill fit mine.yaml --training.lr 0.1 --out '{tmp_path}/my run' --resume --baseline"

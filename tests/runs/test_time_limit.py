"""A run that ends by its time limit, and goes on."""

import time
from types import SimpleNamespace

import pytest
from test_train_resume import assert_same_end

from matchdistill import cli
from matchdistill.ending import OutOfTime
from matchdistill.runs import callbacks
from matchdistill.runs.compare import compare
from matchdistill.runs.evidence import read_epochs
from matchdistill.runs.recipe import resolved_config
from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

RANDOM = ("--distillation.method=mgd-rd+kd", "--training.epochs=3", "--data.augment=true")
LIMITED = ("--training.max_time=8h",)


@pytest.fixture
def late(monkeypatch):
    """For the limit, it is days later."""
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6))


@pytest.mark.parametrize("arguments", [(), ("--distillation.refresh_online=2", "--training.ema=0.9")])
def test_every_call_trains_an_epoch_and_the_end_is_that_of_an_uncut_run(tiny, tmp_path, late, arguments):
    fit(tiny(*RANDOM, *arguments), tmp_path / "whole", quiet=True)
    for epoch in (1, 2):
        with pytest.raises(OutOfTime, match=rf"^training.max_time 8h is over after epoch {epoch} of 3$") as info:
            fit(tiny(*RANDOM, *arguments, *LIMITED), tmp_path / "run", resume=True, quiet=True)
        assert info.value.code == 75
        assert not (tmp_path / "run/metrics.json").exists()
        assert not (tmp_path / "run/.lock").exists()
        assert len(read_epochs(tmp_path / "run")) == epoch
    # The limit may change from call to call, and does not end a run after its last epoch.
    fit(tiny(*RANDOM, *arguments, "--training.max_time=01:30:00"), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_is_in_time_is_the_same(tiny, tmp_path):
    fit(tiny(*RANDOM), tmp_path / "whole", quiet=True)
    fit(tiny(*RANDOM, *LIMITED), tmp_path / "run", quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_the_limit_is_that_of_the_teachers_training_too(tiny, tmp_path, late):
    arguments = ("--teacher.weights=null", "--teacher.training.epochs=2", *RANDOM, *LIMITED)
    out = tmp_path / "run"
    ends = []
    for _ in range(4):
        try:
            fit(tiny(*arguments), out, resume=True, quiet=True)
        except OutOfTime as limit:
            ends.append(str(limit).rpartition("after ")[2])
    assert ends == ["epoch 1 of 2", "epoch 1 of 3", "epoch 2 of 3"]
    assert (out / "metrics.json").exists()
    assert resolved_config(out / "teacher/recipe.yaml")["training"]["max_time"] == "8h"


def test_the_command_says_how_to_go_on(tiny_file, tmp_path, late, capsys, one_thread):
    arguments = ["fit", str(tiny_file), "--out", str(tmp_path / "run"), "--distillation.method=none", *LIMITED]
    assert cli.main(arguments) == 75
    assert capsys.readouterr().err == (
        "matchdistill: training.max_time 8h is over after epoch 1 of 2; finished work is kept: continue a run with "
        "--resume\n"
    )
    assert cli.main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize("value", ["soon", "8 hours", "0h", "1:30", "30", "-1h", "1h 30m"])
def test_what_is_no_time_is_an_error(tiny, value):
    with pytest.raises(ValueError, match=rf"training\.max_time is '{value}': expected a time like '8h'"):
        tiny(f"--training.max_time={value}")


def test_a_comparison_says_which_runs_are_not_done(tiny, tmp_path, late):
    arguments = ("--training.epochs=2", *LIMITED)
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed.*8h is over after epoch 1 of 2 \(none seed 0\)"):
        compare(tiny(*arguments), tmp_path / "all", ["none"], 1)
    assert len(compare(tiny(*arguments), tmp_path / "all", ["none"], 1).runs) == 1

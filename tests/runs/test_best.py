"""The best student beside the last, and the end of a run that finds no better one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_train_resume import assert_same_end, killed, same

from matchdistill.models import small_resnet
from matchdistill.runs.best import is_better
from matchdistill.runs.evidence import read_epochs
from matchdistill.runs.train import fit
from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

# A learning rate so high that the last student is not the best.
KEEPING = ("--distillation.method=kd", "--training.epochs=5", "--training.lr=0.5", "--training.keep_best=true")


def kept(out):
    return json.loads((out / "evidence/best.json").read_text())


def top1(out, recipe):
    student = small_resnet(width=2)
    student.load_state_dict(load_file(out / "best.safetensors"), strict=True)
    images, labels = map(torch.cat, zip(*recipe.data.val_dataloader(), strict=True))
    with torch.no_grad():
        return (student.eval()(images).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("arguments", [(), ("--training.ema=0.5", "--training.validate_every=2")])
def test_the_student_of_the_best_validation_is_kept(tiny, tmp_path, arguments):
    recipe = tiny(*KEEPING, *arguments)
    fit(recipe, tmp_path / "run", quiet=True)
    values = {each["epoch"]: each["val/top1"] for each in read_epochs(tmp_path / "run") if "val/top1" in each}
    found = kept(tmp_path / "run")
    assert found["epoch"] == max(values, key=values.get)  # the first of them
    assert found["step"] == 3 * (found["epoch"] + 1)
    assert found["student"]["top1"] == values[found["epoch"]] == pytest.approx(top1(tmp_path / "run", recipe))


def test_keeping_it_changes_nothing_else(tiny, tmp_path):
    fit(tiny(*KEEPING), tmp_path / "with", quiet=True)
    fit(tiny(*KEEPING[:-1]), tmp_path / "without", quiet=True)
    assert_same_end(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without/best.safetensors").exists()
    assert not (tmp_path / "without/evidence/best.json").exists()


@pytest.mark.parametrize(("moment", "count"), [("step", 8), ("saved", 3), ("student", 1)])
def test_a_resumed_run_keeps_the_same_one(tiny, tmp_path, moment, count):
    fit(tiny(*KEEPING), tmp_path / "whole", quiet=True)
    killed(moment, count, tiny(*KEEPING), tmp_path / "run")
    fit(tiny(*KEEPING), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    assert same(*(load_file(tmp_path / name / "best.safetensors") for name in ("run", "whole")))


def test_the_terminal_says_which_one(tiny, tmp_path, capsys):
    fit(tiny(*KEEPING), tmp_path / "run")
    found = kept(tmp_path / "run")
    told = f"best student: top-1 {found['student']['top1']:.2%} after epoch {found['epoch'] + 1} (best.safetensors)"
    assert told in capsys.readouterr().out


def test_the_metric_says_what_is_better():
    error = Metric("error", "error", higher_is_better=False)
    assert is_better(error, {"error": 0.1}, {"error": 0.2})
    assert not is_better(error, {"error": 0.2}, {"error": 0.1})
    assert is_better(error, {"error": 0.2}, {"error": math.nan})
    assert not is_better(error, {"error": math.nan}, {"error": 0.2})
    assert is_better(error, {"error": math.nan}, None)


@pytest.mark.parametrize("section", ["training", "teacher.training"])
@pytest.mark.parametrize(("name", "value"), [("keep_best", "true"), ("stop_after", 2)])
def test_nothing_measured_is_an_error(tiny, monkeypatch, section, name, value):
    monkeypatch.setattr(type(TASKS["classification"]), "metrics", ())
    with pytest.raises(ValueError, match=f"^{section}.{name} is {value}, but students of classification are not meas"):
        tiny(f"--{section}.{name}={value}")


# Nothing is learned: the second validation is no better than the first.
STOPPING = (
    "--distillation.method=kd",
    "--training.epochs=9",
    "--training.lr=1e-9",
    "--training.stop_after=2",
    "--training.ema=0.9",
)


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_finds_no_better_student_is_finished(tiny, tmp_path, capsys, every):
    recipe, out = tiny(*STOPPING, f"--training.validate_every={every}"), tmp_path / "run"
    metrics = fit(recipe, out)
    values = [each["val/top1"] for each in read_epochs(out) if "val/top1" in each]
    best = values.index(max(values))
    assert len(values) == best + 1 + 2
    assert metrics.epochs == len(read_epochs(out)) == every * len(values) < 9
    assert metrics.student["top1"] == values[-1]
    told = f"stopped after epoch {metrics.epochs}: top-1 was no better in 2 validations in a row\n"
    assert told in capsys.readouterr().out
    assert fit(recipe, out, resume=True) == metrics


def test_validations_that_are_better_do_not_end_a_run(tiny, tmp_path):
    arguments = ("--distillation.method=none", "--training.epochs=3", "--training.stop_after=2")
    assert fit(tiny(*arguments), tmp_path / "run", quiet=True).epochs == 3


@pytest.mark.parametrize(("moment", "count"), [("step", 8), ("saved", 3), ("student", 1)])
def test_a_resumed_run_stops_after_the_same_epoch(tiny, tmp_path, moment, count):
    metrics = fit(tiny(*STOPPING), tmp_path / "whole", quiet=True)
    killed(moment, count, tiny(*STOPPING), tmp_path / "run")
    assert fit(tiny(*STOPPING), tmp_path / "run", resume=True, quiet=True).epochs == metrics.epochs
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_it_is_a_whole_number_from_1_on(tiny):
    with pytest.raises(ValueError, match=r"training\.stop_after is 0: expected a whole number from 1 on"):
        tiny("--training.stop_after=0")

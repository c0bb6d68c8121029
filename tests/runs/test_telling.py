"""What the terminal shows of a training."""

import io
import re

import pytest
import yaml
from rich.console import Console

from matchdistill.runs import train
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.telling import SHARE, costly_refreshes, strong_features
from matchdistill.runs.train import fit

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns."""
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80, markup=False, emoji=False)
    monkeypatch.setattr(train, "console", lambda quiet=False: Console(quiet=True) if quiet else terminal)
    return file


def test_progress_is_one_line_of_a_terminal(tiny, tmp_path, screen):
    fit(tiny("--distillation.method=mgd-amp", "--distillation.refresh_every=1"), tmp_path / "run")
    told = screen.getvalue()
    assert "\x1b[1A" not in told  # what goes up a line has more than one
    shown = [ESCAPES.sub("", part) for part in re.split(r"[\r\n]", told)]
    bars = [line for line in shown if line.startswith("epoch ")]
    assert bars[-1].split()[:2] == ["epoch", "2/2"]
    assert "6/6" in bars[-1]
    assert all(part in bars[-1] for part in ("loss ", "features ", "top-1 "))
    assert all(len(line) <= 80 for line in bars)
    # What a refresh came to stands on lines of its own.
    refreshes = [line for line in shown if "matching of" in line]
    assert len(refreshes) == 2
    assert all(line.startswith("matching of 60 images  cost") for line in refreshes)


def test_without_a_terminal_epochs_are_lines_with_the_time_that_is_left(tiny, tmp_path, capsys):
    fit(tiny("--distillation.method=none", "--data.train_limit=50"), tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"^epoch 1/2  loss .*\nabout \d+ s for 1 more epoch\nepoch 2/2  loss", told, re.MULTILINE)
    assert "10 of 50 images fill no batch of 20 and are left out, others in each epoch (data.batch_size)" in told


def test_how_often_the_matching_is_refreshed_is_told_where_nobody_said_it(tiny, tmp_path, capsys):
    fit(tiny("--distillation.method=mgd-amp", "--distillation.refresh_every=auto"), tmp_path / "run")
    said = "the matching is refreshed every 10 epochs, so that it takes little time (distillation.refresh_every)"
    assert said in capsys.readouterr().out
    for number, arguments in enumerate((["--distillation.method=kd"], ["--distillation.refresh_steps=[[0, 3]]"])):
        fit(
            tiny("--distillation.method=mgd-amp", "--distillation.refresh_every=auto", *arguments),
            tmp_path / str(number),
        )
    assert "is refreshed every" not in capsys.readouterr().out


def test_a_teacher_that_is_trained_first_is_announced(tiny, tmp_path, capsys):
    recipe = tiny(
        "--teacher.weights=null", "--teacher.training.epochs=1", "--training.epochs=1", "--distillation.method=kd"
    )
    fit(recipe, tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"first the teacher: matchdistill.models:small_resnet, 1 epoch\n", told)
    assert re.search(r"the teacher is trained: top-1 [\d.]+%; now the student\n", told)


@pytest.mark.parametrize(("refresh", "epoch", "every", "images"), [(73.0, 102.0, 1, 600), (5.0, 10.0, 2, 300)])
def test_what_costly_refreshes_are_told_brings_their_share_down(refresh, epoch, every, images):
    told = costly_refreshes(refresh, epoch, every, images)
    other = int(re.search(r"refresh_every (\d+)", told)[1])
    fewer = int(re.search(r"refresh_images (\d+)", told)[1])
    assert refresh / (refresh + other * epoch) <= SHARE
    assert refresh / (refresh + (other - 1) * epoch) > SHARE  # no fewer than needed
    cheaper = refresh * fewer / images
    assert SHARE - 0.01 < cheaper / (cheaper + every * epoch) <= SHARE
    assert not costly_refreshes(refresh, epoch, other, images)


@pytest.mark.parametrize(("weight", "told"), [(50.0, True), (0.01, False)])
def test_features_that_drown_the_labels_are_told(tiny, tmp_path, capsys, weight, told):
    fit(tiny("--distillation.method=mgd-amp", f"--distillation.weights.mgd={weight}"), tmp_path / "run")
    found = re.search(r"the loss of features is (\d+) times the loss on labels", capsys.readouterr().out)
    assert (found is not None) is told
    assert found is None or int(found[1]) > 3


def test_the_own_loss_of_a_task_without_labels_is_named(tmp_path, capsys, one_thread):
    network = {"name": "matchdistill.models:small_resnet", "options": {"width": 2}}
    values = {
        "task": "moco",
        "data": {"train_limit": 40, "val_limit": 20, "batch_size": 20},
        "teacher": network,
        "student": network,
        "objective": {"queue": 40},
        "training": {"epochs": 1},
        "distillation": {"method": "mgd-amp", "weights": {"mgd": 500}},
        "trainer": {"accelerator": "cpu", "loggers": []},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    fit(load_recipe(tmp_path / "r.yaml"), tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"the loss of features is \d+ times the InfoNCE loss, and 2 steps are few", told)
    assert "labels" not in told


def test_a_smaller_weight_brings_the_losses_together():
    smaller = float(strong_features(40.0, 2.0, 100, "w", 5.0).split("try w ")[1].split()[0])
    assert 2 <= 40.0 / 2.0 * smaller / 5.0 <= 4

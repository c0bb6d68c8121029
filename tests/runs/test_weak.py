"""Teachers that are not worth learning from are found before anything is trained."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from matchdistill.cli import main
from matchdistill.models import small_resnet
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.train import fit
from matchdistill.runs.weak import JUDGED, Judged, TeacherCheck, judge, weakness
from matchdistill.tasks.metric import Metric
from records import TINY

TOP1 = Metric("top1", "top-1")


def values_of(share, noise_of, images, count=2000):
    """Top-1 of a network that is right by chance alone, and with the labels of other images."""
    drawn = np.random.default_rng(0).binomial(images, [[share, noise_of]] * count) / images
    return [Judged(float(own), float(other), images) for own, other in drawn]


@pytest.mark.parametrize(("classes", "images"), [(2, 300), (10, 300), (10, 50), (200, 300)])
def test_a_teacher_by_chance_is_found_nearly_always(classes, images):
    found = [each.knows_nothing(True) for each in values_of(1 / classes, 1 / classes, images)]
    assert np.mean(found) > 0.95


@pytest.mark.parametrize(("right", "classes"), [(0.7, 2), (0.3, 10), (0.1, 200)])
def test_a_teacher_that_knows_something_is_not(right, classes):
    found = [each.knows_nothing(True) for each in values_of(right, 1 / classes, 300)]
    assert np.mean(found) < 0.01


def test_a_detector_without_a_hit():
    assert "knows nothing" in weakness(Metric("ap", "AP"), "net", Judged(0.0, 0.0, 300), None)
    assert weakness(Metric("ap", "AP"), "net", Judged(0.3, 0.0, 300), None) is None
    # A precision of boxes has none of the noise of a share of images, however few these are.
    assert weakness(Metric("ap", "AP"), "net", Judged(0.085, 0.0005, 60), None) is None
    assert "knows nothing" in weakness(Metric("ap", "AP"), "net", Judged(0.004, 0.002, 60), None)


def test_worse_than_the_student():
    teacher, student = Judged(0.6, 0.1, 300), Judged(0.9, 0.1, 300)
    text = weakness(TOP1, "net", teacher, student)
    assert (
        "worse than its student before training: top-1 60.00% on 300 validation images, the student has 90.00%" in text
    )
    assert weakness(TOP1, "net", student, teacher) is None
    assert weakness(TOP1, "net", teacher, Judged(0.62, 0.1, 300)) is None  # by noise


class Always(nn.Module):
    """Knows one class alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot(torch.full((len(images),), 3), 10).float() + self.weight


class Nearest(nn.Module):
    """Knows the images that it has seen."""

    def __init__(self, images, labels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.images, self.labels = images.flatten(1), labels

    def forward(self, images):
        at = torch.cdist(images.flatten(1), self.images).argmin(1)
        return nn.functional.one_hot(self.labels[at], 10).float() + self.weight


def test_measured_values(tiny):
    recipe = tiny("--data.val_limit=300")
    module = build_module(recipe)
    device = torch.device("cpu")
    images, labels = recipe.data.val_set.__getitems__(list(range(300)))
    known = judge(module, Nearest(images, labels), TOP1, recipe.data, device)
    assert known.value == 1.0
    assert known.chance < 0.2
    assert known.images == 300
    # A constant answer is right as often as its class is there, whichever image it is given.
    constant = judge(module, Always(), TOP1, recipe.data, device)
    assert constant.value == constant.chance == pytest.approx(float((labels == 3).float().mean()))
    assert constant.knows_nothing(True)
    assert not known.knows_nothing(True)


def test_an_untrained_teacher_is_refused_and_nothing_is_left(tmp_path, teacher_weights, capfd):
    path, out = tmp_path / "mine.yaml", tmp_path / "run"
    teacher = {**TINY["teacher"], "weights": str(teacher_weights)}
    path.write_text(yaml.safe_dump({**TINY, "teacher": teacher, "data": {"batch_size": 20, "train_limit": 60}}))
    assert main(["fit", str(path), "--out", str(out)]) == 2
    told = capfd.readouterr().err
    assert told.startswith(
        "matchdistill: error: the teacher matchdistill.models:small_resnet knows nothing of these classes"
    )
    assert "--allow-weak-teacher" in told
    assert told.count("\n") == 1
    assert not (out / "recipe.yaml").exists()
    assert main(["compare", str(path), "--out", str(out)]) == 2
    assert "knows nothing" in capfd.readouterr().err
    assert not list(out.glob("cells/*/*"))

    assert (
        main(["fit", str(path), "--out", str(tmp_path / "meant"), "--allow-weak-teacher", "--training.epochs=1"]) == 0
    )
    assert capfd.readouterr().out.count("knows nothing") == 1
    assert yaml.safe_load((tmp_path / "meant" / "recipe.yaml").read_text())["teacher"]["allow_weak"]
    # What was measured is not measured again.
    recipe = load_recipe(path)
    check = TeacherCheck(recipe, build_module(recipe), tmp_path / "meant")
    assert len(check.known) == 1
    check.known = {key: {"value": 0.9, "chance": 0.1, "images": 300} for key in check.known}
    assert check.found(torch.device("cpu")) is None


def test_runs_of_a_comparison_share_what_was_measured(tiny, tmp_path):
    recipe = tiny()
    inside = TeacherCheck(recipe, build_module(recipe), tmp_path / "cells" / "kd" / "seed0")
    assert inside.path == tmp_path / JUDGED


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({"distillation__method": "mgd-amp"}, True),
        ({"distillation__method": "mgd-amp", "teacher__fresh_head": True}, False),
        ({"distillation__method": "kd", "teacher__fresh_head": True}, True),
        ({"distillation__method": "mgd-amp", "teacher__weights": None}, True),
        ({"distillation__method": "none"}, False),
    ],
)
def test_heads_that_were_not_trained_for_the_classes_say_nothing(tiny, tmp_path, changes, applies):
    recipe = Recipe.of(tiny().config, **changes)
    assert TeacherCheck(recipe, build_module(recipe), tmp_path).applies is applies


def test_a_student_that_knows_more_than_its_teacher(tiny, tmp_path):
    torch.manual_seed(0)
    recipe = tiny("--data.val_limit=250", "--distillation.method=kd")
    weights = tmp_path / "student.pt"
    torch.save(small_resnet(width=2).state_dict(), weights)
    recipe = Recipe.of(recipe.config, student__weights=str(weights))
    check = TeacherCheck(recipe, build_module(recipe), tmp_path)
    for network, value in ((check.module.teacher, 0.5), (check.module.network(), 0.9)):
        check.known[check._key(network)] = {"value": value, "chance": 0.1, "images": 250}
    with pytest.raises(ValueError, match="is worse than its student before training"):
        check.found(torch.device("cpu"))


def test_the_check_changes_nothing_of_the_result(tiny, tmp_path, monkeypatch):
    recipe = tiny("--training.epochs=1")
    first = fit(recipe, tmp_path / "first", quiet=True)
    monkeypatch.setattr(TeacherCheck, "found", lambda check, device: None)
    second = fit(tiny("--training.epochs=1"), tmp_path / "second", quiet=True)
    assert first.student == second.student
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]

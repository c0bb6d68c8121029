"""Runs of the task features: what tests/runs/test_train*.py see to of classifiers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from matchdistill import cli
from matchdistill.data import UnlabelledData
from matchdistill.models import build_model, small_resnet
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.build import build_module
from matchdistill.runs.compare import compare
from matchdistill.runs.evidence import PICTURES, load, read_epochs
from matchdistill.runs.metrics import comparing
from matchdistill.runs.predict import Predictor
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks import TASKS
from matchdistill.tasks.features.module import FeaturesModule, Likeness
from matchdistill.tasks.neighbours import neighbour_classes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:You are trying to `self.log", "ignore:.*taken out")
]

NET = "matchdistill.models:small_resnet"
RECIPE = {
    "task": "features",
    "data": {"train_limit": 60, "val_limit": 40, "batch_size": 20, "bank_limit": 50},
    "teacher": {"name": NET, "options": {"width": 4}},
    "student": {"name": NET, "options": {"width": 2}},
    "training": {"epochs": 2, "lr": 0.05},
    "trainer": {"accelerator": "cpu", "loggers": []},
}


@pytest.fixture
def tree(tmp_path):
    """Images without labels."""
    root = tmp_path / "tree"
    for number in range(24):
        path = root / ("a", "b/c", "")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(256, size=(18, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return root


@pytest.fixture
def recipe(tmp_path):
    """A function that makes the recipe, with values by section over it."""

    def make(arguments=(), **sections):
        values = {**RECIPE, **{name: {**RECIPE.get(name, {}), **own} for name, own in sections.items()}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "r.yaml", *arguments)

    return make


@pytest.fixture
def of_tree(recipe, tree):
    """The recipe on images without labels."""
    data = {
        "name": "folder",
        "root": str(tree),
        "image_size": 16,
        "train_limit": None,
        "val_limit": None,
        "batch_size": 9,
    }
    return lambda *arguments, **sections: recipe(arguments, data=data, **sections)


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("method", ["mgd-rd", "ofd"])
def test_a_killed_run_ends_as_it_would_have(of_tree, tmp_path, monkeypatch, method):
    arguments = ("--training.epochs=3", "--training.ema=0.6", f"--distillation.method={method}")
    whole = fit(of_tree(*arguments), tmp_path / "whole", quiet=True)

    def killed(self, *_):
        if self.current_epoch == 2:
            raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(FeaturesModule, "on_train_batch_end", killed)
        with pytest.raises(KeyError):
            fit(of_tree(*arguments), tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    run = fit(of_tree(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert run.student == whole.student
    first, second = (checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert_equal(first["state_dict"], second["state_dict"])
    assert_equal(first[TRAINED], second[TRAINED])
    assert_equal(*(load_file(tmp_path / name / "student.safetensors") for name in ("run", "whole")))


def pooled(network, images):
    """By a hook."""
    found = []
    handle = network.fc.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        network.eval()(images)
    handle.remove()
    return found[0]


@pytest.mark.pages
def test_with_labels_the_classes_are_told_apart(recipe, tmp_path):
    start = build_model(NET, width=2).fc.weight.shape
    metrics = fit(recipe(), tmp_path / "run", quiet=True)
    assert metrics.student.keys() == metrics.teacher.keys() == {"knn", "probe"}
    student, described = load_student(tmp_path / "run")
    assert (described["num_classes"], described["class_names"]) == (0, [])  # no head was trained for those of the data
    assert student.fc.weight.shape == start  # the library's own head
    data = UnlabelledData(**RECIPE["data"])
    data.setup()
    (bank, labels), (images, truth) = (each.__getitems__(range(len(each))) for each in (data.bank_set, data.val_set))
    found = neighbour_classes(pooled(student, bank), labels, pooled(student, images))[0]
    assert metrics.student["knn"] == pytest.approx((found == truth).float().mean().item())
    assert validate(recipe(), tmp_path / "run")["student"] == metrics.student
    page = (tmp_path / "run" / "report.html").read_text()
    assert "without labels, of the teacher its features by Matching Guided Distillation" in page
    told = load(tmp_path / "run" / PICTURES)[1]["images"]
    assert all(own.keys() == {"truth", "student", "teacher"} for own in told)
    assert " of 20)" in told[0]["student"]
    first, last = read_epochs(tmp_path / "run")
    assert "val/knn" in first
    assert "val/probe" not in first  # which is for the end
    assert "val/probe" in last


@pytest.mark.parametrize("option", ["keep_best=true", "stop_after=1"])
def test_any_epoch_may_be_the_result(recipe, tmp_path, option):
    out = tmp_path / "run"
    metrics = fit(recipe([f"--training.{option}", "--training.lr=0.0001"]), out, quiet=True)
    assert metrics.student.keys() == {"knn", "probe"}
    if option.startswith("keep"):
        assert json.loads((out / "evidence" / "best.json").read_text())["student"].keys() == {"knn", "probe"}


def test_without_labels_features_are_compared(of_tree, tmp_path):
    metrics = fit(of_tree("--training.keep_best=true"), tmp_path / "run", quiet=True)
    assert metrics.student.keys() == {"matched_cosine", "held_out_loss"}
    assert metrics.teacher == {}
    best = json.loads((tmp_path / "run" / "evidence" / "best.json").read_text())["student"]
    assert best["matched_cosine"] == max(each["val/matched_cosine"] for each in read_epochs(tmp_path / "run"))
    assert comparing([metrics]) is TASKS["features"].metrics[2]


@pytest.mark.parametrize("method", ["mgd-amp", "fitnets", "none"])
@pytest.mark.parametrize("pooled", [False, True])
def test_validation_measures_what_the_run_did(of_tree, tmp_path, method, pooled):
    """The teacher has no weights: they are random, by the seed."""
    arguments = (
        f"--distillation.method={method}",
        f"--distillation.pooled={str(pooled).lower()}",
        "--training.ema=0.5",
    )
    fitted = fit(of_tree(*arguments), tmp_path / "run", quiet=True)
    found = validate(of_tree(*arguments), tmp_path / "run")
    assert found["student"] == pytest.approx(fitted.student, rel=1e-5)
    assert ("held_out_loss" in found["student"]) is (method != "none")
    if method == "fitnets":
        (tmp_path / "run" / "last.ckpt").unlink()
        with pytest.warns(
            UserWarning, match=r"the loss of features is not measured: it takes .*last.ckpt, which is gone"
        ):
            left = validate(of_tree(*arguments), tmp_path / "run")["student"]
        assert left == {"matched_cosine": pytest.approx(fitted.student["matched_cosine"], rel=1e-5)}


@pytest.mark.pages
def test_a_run_that_learns_from_its_teacher_alone_names_no_student_alone(of_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_tree(training={"epochs": 1})
    assert cli.main(["fit", "r.yaml", "--out=run"]) == 0
    shown = capsys.readouterr().out
    assert "held-out feature loss" in shown
    assert "student alone" not in shown
    assert "--baseline" not in Path("run/report.html").read_text()


@pytest.mark.pages
def test_the_student_as_it_was_given_is_what_methods_are_compared_with(of_tree, teacher_weights, tmp_path):
    """It is measured and not trained, beside its teacher without labels."""
    made = of_tree("--training.ema=0.9", "--training.keep_best=true", f"--teacher.weights={teacher_weights}")
    compared = compare(made, tmp_path / "all", ["none", "fitnets"], seeds=1)
    alone, distilled = compared.runs
    assert (alone.epochs, distilled.epochs) == (0, 2)
    run = tmp_path / "all" / "cells" / "none" / "seed0"
    recipe_alone = Recipe.of(made.config, distillation__method="none")
    start = build_module(recipe_alone)
    assert_equal(load_file(run / "student.safetensors"), dict(start.network().state_dict()))
    likeness = Likeness(start._compared[0])
    data = recipe_alone.data
    with torch.no_grad(), start.eval()._compared[0].capture() as captured:
        start.network()(data.val_set.__getitems__(range(len(data.val_set)))[0])
        likeness.update(captured, len(data.val_set), False)
    assert alone.student == {"matched_cosine": pytest.approx(likeness.compute()["matched_cosine"].item(), abs=1e-5)}
    gain = distilled.student["matched_cosine"] - alone.student["matched_cosine"]
    assert compared.summary[1].difference.mean == pytest.approx(gain)
    assert validate(recipe_alone, run)["student"] == alone.student
    page = (tmp_path / "all" / "report.html").read_text()
    assert "Differences to &#39;none&#39;" in page
    assert [page.count(f"{role}: nearest training image") for role in ("teacher", "none", "fitnets")] == [2 * 2] * 3
    page = (run / "report.html").read_text()
    assert "The student learns nothing and is as it was given." in page
    assert "To repeat it" in page
    assert "student: nearest training image, cosine " in page


def test_the_student_as_it_was_given_by_labels(recipe, tmp_path):
    arguments = ("--distillation.method=none", "--teacher.name=null")
    metrics = fit(recipe(arguments), tmp_path / "run", quiet=True)
    assert metrics.student.keys() == {"knn", "probe"}
    assert metrics.teacher == {}
    again = recipe(arguments)
    assert validate(again, tmp_path / "run")["student"] == metrics.student
    assert fit(again, tmp_path / "run", resume=True, quiet=True) == metrics


def test_without_labels_there_must_be_something_to_compare_with(of_tree, tmp_path):
    with pytest.raises(ValueError, match=r"^there is nothing to measure: without labels .*teacher.name"):
        fit(of_tree("--distillation.method=none", "--teacher.name=null"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_without_labels_the_page_shows_the_nearest_training_images(of_tree, tmp_path):
    made = of_tree("--training.epochs=1", "--distillation.method=at")
    fit(made, tmp_path / "run", quiet=True)
    tensors, told = load(tmp_path / "run" / PICTURES)
    student, data = load_student(tmp_path / "run")[0], made.data
    (shown, _), (bank, _) = (each.__getitems__(range(len(each))) for each in (data.val_set, data.bank_set))
    cosines = torch.cosine_similarity(pooled(student, shown)[:, None], pooled(student, bank)[None], dim=2)
    assert len(told["images"]) == len(shown) == 2
    for number, (each, cosine) in enumerate(zip(told["images"], cosines, strict=True)):
        assert each.keys() == {"student", "teacher"}
        assert each["student"]["words"] == f"nearest training image, cosine {cosine.max():.2f}"
        nearest = (255 * data.preparation.pixels(bank[cosine.argmax()])).clamp(0, 255)
        torch.testing.assert_close(tensors[f"drawn student{number}"].float(), nearest, atol=1, rtol=0)


def test_the_commands_take_it(of_tree, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(small_resnet(width=4).state_dict(), "teacher.pt")
    of_tree(teacher={"weights": "teacher.pt"})
    assert cli.main(["compare", "r.yaml", "--out", "all", "--methods=fitnets,mgd-amp", "--seeds=1", "--jobs=1"]) == 0
    assert "cosine of matched pairs" in capsys.readouterr().out
    run = "all/cells/mgd-amp/seed0"
    assert cli.main(["validate", run]) == 0
    shown = capsys.readouterr().out
    cosine = json.loads(Path(run, "metrics.json").read_text())["student"]["matched_cosine"]
    assert f"{cosine:.4g}" in shown
    for kind in ("safetensors", "onnx"):
        assert cli.main(["export", run, "--format", kind]) == 0
    card = Path(run, "export", "model_card.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "8 for an image: what the layer `fc` of the network is given" in card
    assert "0 classes" not in card
    config = json.loads(Path(run, "export", "config.json").read_text())
    assert (config["task"], config["num_features"]) == ("features", 8)
    capsys.readouterr()
    assert cli.main(["validate", f"{run}/export/model.onnx"]) == 2
    assert "without labels a student is measured from its weights" in capsys.readouterr().err
    assert cli.main(["predict", run, str(tree), "--out", "found.csv"]) == 0
    rows = list(csv.reader(Path("found.csv").read_text().splitlines()))
    assert rows[0] == ["path", *(f"feature_{number}" for number in range(8))]
    assert len(rows) == 25
    predictor = Predictor(f"{run}/export/model.onnx")
    paths = [row[0] for row in rows[1:]]
    by_program = torch.tensor([found.features for found in predictor(paths)])
    by_weights = torch.tensor([[float(value) for value in row[1:]] for row in rows[1:]])
    torch.testing.assert_close(by_program, by_weights, atol=1e-4, rtol=1e-4)
    images = torch.stack([predictor.predicting.prepare(Image.open(path).convert("RGB")) for path in paths])
    student, _ = load_student(Path(run))
    torch.testing.assert_close(pooled(student, images), by_weights, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(f"{run}/export/model.onnx")
    assert [each.name for each in session.get_outputs()] == ["features"]


def test_a_part_and_the_pooled_output(of_tree, tmp_path, monkeypatch):
    """The part of a network that has a decoder too, which keeps its weights and stays in the file."""
    (tmp_path / "nets_of_test.py").write_text(
        "from torch import nn\nfrom matchdistill.models import small_resnet\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.encoder, self.decoder = small_resnet(width=width), nn.Linear(10, 3)\n\n"
        "    def forward(self, images):\n        return self.decoder(self.encoder(images))\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"name": "nets_of_test:Net", "options": {"width": 2}, "part": "encoder"}
    made = of_tree("--distillation.pooled=true", student=own)
    start = {name: value.clone() for name, value in build_module(made).network().state_dict().items()}
    fit(made, tmp_path / "run", quiet=True)
    student, described = load_student(tmp_path / "run", trust=True)
    assert described["part"] == "encoder"
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, start[name])}
    assert student.state_dict().keys() == start.keys()
    assert "encoder.stem.0.weight" in changed
    assert not any(name.startswith(("decoder.", "encoder.fc.")) for name in changed)
    assert "train/features_3" in read_epochs(tmp_path / "run")[-1]  # three stages and the pooled output
    predictor = Predictor(tmp_path / "run", trust=True)
    assert len(predictor.predicting.columns) == 9


def test_mixed_precision(recipe, tmp_path):
    metrics = fit(recipe(["--trainer.precision=bf16-mixed", "--training.epochs=1"]), tmp_path / "run", quiet=True)
    assert 0 <= metrics.student["knn"] <= 1


def test_fine_tuning_begins_with_the_body(recipe, tmp_path):
    """The classes that served to measure are no classes that a head was trained for."""
    fit(recipe(["--training.epochs=1"]), tmp_path / "run", quiet=True)
    distilled = load_file(tmp_path / "run" / "student.safetensors")
    tuning = {"data": {"train_limit": 60, "val_limit": 40, "batch_size": 20}, "distillation": {"method": "none"}}
    values = {
        **tuning,
        "student": {**RECIPE["student"], "weights": str(tmp_path / "run")},
        "trainer": RECIPE["trainer"],
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(UserWarning, match=r"starts untrained \(fc.weight, fc.bias\)"):
        state = build_module(load_recipe(tmp_path / "tune.yaml")).network().state_dict()
    assert state["fc.weight"].shape == (10, 8)
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    assert_equal(body, {name: value for name, value in distilled.items() if not name.startswith("fc.")})


@pytest.mark.slow
@pytest.mark.parametrize("labels", [True, False])
def test_two_processes_measure_as_one(recipe, of_tree, teacher_weights, tmp_path, labels):
    arguments = ["--data.batch_size=5", f"--teacher.weights={teacher_weights}"]
    make = recipe if labels else lambda given: of_tree(*given)
    config = make([*arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]).config
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "matchdistill", "fit", "two.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    student = json.loads((tmp_path / "run" / "metrics.json").read_text())["student"]
    one = validate(make(arguments), tmp_path / "run")["student"]
    if labels:
        assert student["knn"] == pytest.approx(one["knn"])
        assert student["probe"] == pytest.approx(one["probe"], abs=0.026)
    else:
        assert student["matched_cosine"] == pytest.approx(one["matched_cosine"], abs=1e-5)
        assert student["held_out_loss"] > 0

"""Runs of networks that give every pixel a class: what tests/runs/test_train*.py see to of classifiers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from matchdistill import cli
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.build import build_module
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.predict import Predictor
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks.segmentation.module import SegmentationModule
from pixelsets import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:You are trying to `self.log")


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("method", ["mgd-amp", "mgd-rd+kd", "none"])
def test_a_killed_run_ends_as_it_would_have(pixelset, tmp_path, monkeypatch, method):
    """With kd the distiller sees whole networks, without it their backbones."""
    arguments = ("--training.epochs=3", f"--distillation.method={method}", "--training.ema=0.6")
    fit(pixelset(*arguments), tmp_path / "whole", quiet=True)

    def killed(self, *_):
        if self.current_epoch == 2:
            raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "on_train_batch_end", killed, raising=False)
        with pytest.raises(KeyError):
            fit(pixelset(*arguments), tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    fit(pixelset(*arguments), tmp_path / "run", resume=True, quiet=True)
    whole, run = (checkpoint(tmp_path / name) for name in ("whole", "run"))
    assert_equal(whole["state_dict"], run["state_dict"])
    assert_equal(whole[TRAINED], run[TRAINED])
    assert_equal(*(load_file(tmp_path / name / "student.safetensors") for name in ("whole", "run")))
    assert read_metrics(tmp_path / "whole").student == read_metrics(tmp_path / "run").student


def test_the_teacher_is_trained_first_and_the_backbone_kept_once(pixelset, tmp_path):
    recipe = pixelset("--teacher.training.epochs=1", "--training.epochs=1", "--training.loss=ce+dice")
    metrics = fit(recipe, tmp_path / "run", quiet=True)
    assert (
        {"miou", "pixel_accuracy"}
        <= metrics.student.keys()
        <= {"miou", "pixel_accuracy", *(f"iou_{name}" for name in CLASSES)}
    )
    assert metrics.teacher == read_metrics(tmp_path / "run/teacher").student
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert sum("layer1.conv1.weight" in name for name in state) == 1
    assert not any("teacher" in name for name in state)
    assert validate(recipe, tmp_path / "run", trust=True)["student"] == metrics.student


def test_masks_of_no_class_end_a_run_that_did_not_read_them_first(pixelset, tmp_path):
    recipe = pixelset("--data.check_masks=false", "--training.epochs=1", "--distillation.method=none")
    recipe.data.setup()
    recipe.data.val_set.images.masks.labels[:] = -1
    with pytest.raises(
        FloatingPointError, match=r"mIoU of the student is nan on the validation images: either nothing"
    ):
        fit(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/metrics.json").exists()


def test_it_learns(pixelset, tmp_path):
    """From bright crosses and discs on noise, in a few epochs, far more than the share of the background."""
    arguments = ("--training.epochs=40", "--training.lr=0.1", "--distillation.method=none", "--data.scale=[1,1]")
    metrics = fit(pixelset(*arguments, "--training.validate_every=40"), tmp_path / "run", quiet=True)
    assert metrics.student["pixel_accuracy"] > 0.9
    assert min(metrics.student[f"iou_{name}"] for name in CLASSES) > 0.5


def test_mixed_precision_and_accumulation(pixelset, tmp_path):
    arguments = ("--trainer.precision=bf16-mixed", "--training.accumulate=2", "--distillation.method=mgd-amp+kd")
    metrics = fit(pixelset(*arguments, "--trainer.channels_last=true"), tmp_path / "run", quiet=True)
    assert 0 <= metrics.student["miou"] <= 1
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/student.safetensors").values())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert cli.main(list(map(str, arguments))) == code, capsys.readouterr().err
        read = capsys.readouterr()
        return read.out if code == 0 else read.err

    return run


@pytest.mark.pages
def test_all_commands(run, pixelset_file, pixels):
    assert "mIoU" in run("fit", pixelset_file, "--out=one", "--training.epochs=1")
    metrics = json.loads(Path("one/metrics.json").read_text())
    assert "mIoU" in run("validate", "one", "--trust")

    page = Path("one/report.html").read_text()
    assert page.count('class="drawn"') == 2 * 4 + 4  # truth, teacher and student of four images
    assert "validation image 1, truth: ground" in page
    assert "mIoU" in page

    for kind in ("safetensors", "onnx"):
        assert "outputs within" in run("export", "one", f"--format={kind}", "--trust")
        measured = validate_file(run, f"one/export/model.{kind}")
        assert measured == pytest.approx(metrics["student"]["miou"], abs=1e-4)
    assert "outputs within" in run(
        "export", "one", "--format=onnx", "--resize=outside", "--out=coarse/model.onnx", "--trust"
    )
    assert validate_file(run, "coarse/model.onnx") == pytest.approx(metrics["student"]["miou"], abs=1e-4)
    import onnxruntime

    for file, size in (("one/export", (36, 44)), ("coarse", (9, 11))):
        session = onnxruntime.InferenceSession(f"{file}/model.onnx", providers=["CPUExecutionProvider"])
        assert session.run(None, {"images": np.zeros((2, 3, 36, 44), np.float32)})[0].shape == (2, 3, *size)
    card = Path("one/export/model_card.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "mean_iou" in card
    config = json.loads(Path("one/export/config.json").read_text())
    assert (config["task"], config["label_names"], config["size"]) == ("segmentation", CLASSES, None)

    compared = run(
        "compare", pixelset_file, "--methods=none,kd,mgd-amp+kd", "--seeds=1", "--training.epochs=1", "--out=all"
    )
    assert "mgd-amp+kd" in compared
    assert "mIoU" in Path("all/report.html").read_text()


def validate_file(run, file):
    run("predict", file, "one/none.png", "--trust", code=2)  # there is no such image
    return validate(load_recipe("one/recipe.yaml"), Path("one"), Path(file), trust=True)["student"]["miou"]


def test_what_is_found_is_written_in_every_form(run, pixelset_file, pixels):
    run("fit", pixelset_file, "--out=one", "--training.epochs=6", "--distillation.method=none", "--training.lr=0.1")
    shown = run("predict", "one", pixels / "val/images", "--trust", "--out=a.csv", "--draw=drawn", "--masks=masks")
    assert "5 images in" in shown
    run("predict", "one", pixels / "val/images", "--trust", "--out=a.json")
    found = Predictor("one", trust=True)(sorted((pixels / "val/images").glob("*.png")))
    network = build_module(load_recipe("one/recipe.yaml")).network().eval()
    network.load_state_dict(load_file("one/student.safetensors"))
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    entries = json.loads(Path("a.json").read_text())
    data = module_data("one/recipe.yaml")
    for number, own in enumerate(found):
        image, _ = data.val_set[number]
        with torch.no_grad():
            expected = network(image[None])["out"].argmax(1)[0].numpy()
        assert np.array_equal(own.values, expected)
        written = Image.open(f"masks/{number:03}.png")
        assert written.mode == "P"
        assert np.array_equal(np.asarray(written), expected)
        classes, counts = np.unique(expected, return_counts=True)
        shares = {CLASSES[label]: count / expected.size for label, count in zip(classes, counts, strict=True)}
        mine = {row["label"]: float(row["share"]) for row in rows if row["path"] == own.path}
        assert mine == pytest.approx(shares)
        assert list(mine.values()) == sorted(mine.values(), reverse=True)
        for entry in (entry for entry in entries if entry["file_name"] == own.path):
            runs = entry["segmentation"]["counts"]
            drawn = np.repeat(np.arange(len(runs)) % 2, runs).reshape(expected.shape[::-1]).T
            assert np.array_equal(drawn, expected == entry["category_id"])
        picture = np.asarray(Image.open(f"drawn/{number:03}.png").convert("RGB")).astype(int)
        original = np.asarray(Image.open(own.path).convert("RGB")).astype(int)
        near = np.abs(picture - 0.4 * original).max(2) <= 1
        assert not near[expected != 0].any()
        assert near[expected == 0].mean() > 0.2  # elsewhere stand the names


def module_data(recipe):
    data = load_recipe(recipe).data
    data.setup()
    return data


def test_pictures_are_resized_for_the_network_and_back(run, pixelset_file, pixels):
    run("fit", pixelset_file, "--out=one", "--training.epochs=1", "--data.size=20", "--distillation.method=none")
    (found,) = Predictor("one", top=1, trust=True)(pixels / "val/images/001.png")
    assert found.values.shape == (28, 48)
    assert len(found.labels) == 1
    assert json.loads(Path("one/model.json").read_text())["size"] == 20


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["export", "one", "--resize=around"],
            "--resize around: expected inside or outside, for students of segmentation",
        ),
        (["export", "one", "--format=pt2"], "format 'pt2': segmentation is exported as safetensors or onnx"),
        (["predict", "one", "IMAGES", "--masks=IMAGES"], "is one of the images: draw into another folder"),
    ],
)
def test_commands_that_cannot_do_it(run, pixelset_file, pixels, command, said):
    run("fit", pixelset_file, "--out=one", "--training.epochs=1", "--distillation.method=none")
    images = str(pixels / "val/images")
    assert said in run(*(part.replace("IMAGES", images) for part in command), "--trust", code=2)


def test_masks_are_of_this_task_alone(run, tiny_file):
    run("fit", tiny_file, "--out=one", "--training.epochs=1", "--distillation.method=none")
    Image.new("RGB", (20, 20)).save("a.png")
    assert "--masks is for students that give every pixel a class" in run(
        "predict", "one", "a.png", "--masks=m", code=2
    )
    assert "for students of segmentation" in run("export", "one", "--resize=inside", code=2)


RUNNER = """
import os, sys, torch
from matchdistill import cli
from matchdistill.distiller import MatchingDistiller
from matchdistill.tasks.segmentation.module import SegmentationModule

rank, seen = int(os.environ.get("LOCAL_RANK", 0)), {"validated": 0, "matchings": []}
measure, refresh = SegmentationModule.measure, MatchingDistiller.refresh

def counted(self, measured, network, batch):
    seen["validated"] += len(batch[0]) * (network is self.network())
    return measure(self, measured, network, batch)

def recorded(self, loader, max_images, **options):
    matchings = refresh(self, loader, max_images, **options)
    seen["matchings"].append([(matching.index, matching.cost, matching.images) for matching in matchings])
    return matchings

SegmentationModule.measure, MatchingDistiller.refresh = counted, recorded
torch.set_num_threads(1)
code = cli.main(sys.argv[1:])
torch.save(seen, f"seen{rank}.pt")
sys.exit(code)
"""


@pytest.mark.slow
def test_two_processes(tmp_path, pixelset_file, pixelset):
    """Both measure their share, match by all images, and end with one student."""
    (tmp_path / "runner.py").write_text(RUNNER)
    arguments = [
        "fit",
        str(pixelset_file),
        "--out=run",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.batch_size=2",
    ]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "runner.py", *arguments], cwd=tmp_path, env=environment, check=True, timeout=600)
    seen = [torch.load(tmp_path / f"seen{rank}.pt") for rank in range(2)]
    assert [each["validated"] for each in seen] == [2 * 3, 2 * 2]  # two epochs, five images
    for first, second in zip(*(each["matchings"] for each in seen), strict=True):
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one[0], other[0])
            assert one[2] == other[2] == 8
    metrics = read_metrics(tmp_path / "run")
    recipe = pixelset()
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["trainer"]["devices"] == 2
    measured = validate(recipe, tmp_path / "run", trust=True)["student"]
    assert measured == pytest.approx(metrics.student, abs=1e-6)

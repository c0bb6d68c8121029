"""Runs of detectors: what tests/runs/test_train*.py see to of classifiers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from detectors import FEW
from matchdistill import cli
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.build import build_module
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks.detection.module import DetectionModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:You are trying to `self.log")


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def two_stages(architecture):
    options = {"architecture": architecture, **FEW}
    return [f"--{role}.options.{key}={value}" for role in ("student", "teacher") for key, value in options.items()]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def refreshes(monkeypatch):
    """The step and the number of images of every refresh."""
    found = []

    def recorded(self, loader, refresh=DetectionModule.refresh):
        matchings = refresh(self, loader)
        found.append((self.global_step, matchings[0].images))
        return matchings

    monkeypatch.setattr(DetectionModule, "refresh", recorded)
    return found


def test_refreshes_by_steps(small, tmp_path, refreshes):
    arguments = ("--data.batch_size=2", "--training.epochs=3", "--training.accumulate=2", "--training.validate_every=9")
    # 8 images in batches of 2, two of which make a step: 2 steps an epoch. A refresh asks for more images than there are.
    phases = "--distillation.refresh_steps=[[0, 3], [4, 5]]"
    fit(small(*arguments, phases), tmp_path / "run", quiet=True)
    assert refreshes == [(0, 8), (3, 8), (5, 8)]
    refreshes.clear()
    fit(small(*arguments, phases, "--distillation.method=random-amp"), tmp_path / "random", quiet=True)
    assert refreshes == [(0, 8)]


@pytest.mark.parametrize("options", [(), ("--training.ema=0.6", "--distillation.method=mgd-rd")], ids=["", "averaged"])
def test_a_killed_run_ends_as_it_would_have(small, tmp_path, monkeypatch, options):
    arguments = ("--training.epochs=3", "--training.warmup_steps=4", "--distillation.refresh_steps=[[0, 3]]", *options)
    fit(small(*arguments), tmp_path / "whole", quiet=True)

    def killed(self, *_):
        if self.current_epoch == 2:
            raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(DetectionModule, "on_train_batch_end", killed, raising=False)
        with pytest.raises(KeyError):
            fit(small(*arguments), tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    fit(small(*arguments), tmp_path / "run", resume=True, quiet=True)
    run, whole = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole")
    assert_equal(run["state_dict"], whole["state_dict"])
    assert run["results"] == whole["results"]
    names = set(whole["state_dict"])
    assert {name.partition(".")[0] for name in names} == {"student", "distiller"}
    assert not any(name.startswith("distiller.student.") for name in names)
    assert_equal(*(load_file(tmp_path / name / "student.safetensors") for name in ("run", "whole")))
    if options:
        assert_equal(run[TRAINED], whole[TRAINED])
        averaged = {
            name.removeprefix("student."): run["state_dict"][name] for name in names if name.startswith("student.")
        }
        assert_equal(averaged, load_file(tmp_path / "run" / "student.safetensors"))
        assert not torch.equal(
            averaged["backbone.body.layer1.0.conv1.weight"], run[TRAINED]["backbone.body.layer1.0.conv1.weight"]
        )


def test_a_teacher_is_trained_first_and_files_measure_as_the_metrics(small, small_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--teacher.training.epochs=1", "--training.epochs=1", "--training.lr=0.001")
    metrics = fit(small(*arguments), out, quiet=True)
    assert metrics.teacher.keys() == metrics.student.keys() >= {"ap", "ap50", "ap75"}
    assert metrics.teacher == json.loads((out / "teacher" / "metrics.json").read_text())["student"]
    for weights in (None, "last.ckpt"):
        measured = validate(small(*arguments), out, weights and out / weights, trust=True)
        assert measured == {role: pytest.approx(metrics.of(role)) for role in ("student", "teacher")}

    assert cli.main(["validate", str(out), "--trust"]) == 0
    shown = capsys.readouterr().out
    assert "AP50" in shown
    assert "error" not in shown
    assert cli.main(["export", str(out), "--trust", "--out", str(tmp_path / "detector.safetensors")]) == 0
    assert_equal(load_file(tmp_path / "detector.safetensors"), load_file(out / "student.safetensors"))
    images = [torch.rand(3, 40, 60)]
    rebuilt, described = load_student(out, trust=True)
    assert described["task"] == "detection"
    with torch.no_grad():
        assert rebuilt(images)[0]["boxes"].shape[1] == 4
    assert cli.main(["export", str(out), "--trust", "--format=pt2"]) == 2
    assert "detection is exported as safetensors or onnx" in capsys.readouterr().err
    assert not (out / "export" / "model.pt2").exists()
    (tmp_path / "student.pt2").write_bytes(b"")
    with pytest.raises(ValueError, match=r"measured from weights \(.safetensors, .ckpt\) or .onnx"):
        validate(small(*arguments), out, tmp_path / "student.pt2", trust=True)
    pytest.importorskip("onnxruntime")
    assert cli.main(["export", str(out), "--trust", "--format=onnx"]) == 0
    capsys.readouterr()
    assert cli.main(["validate", str(out / "export" / "model.onnx"), "--trust"]) == 0
    assert "AP50" in capsys.readouterr().out
    measured = validate(small(*arguments), out, out / "export" / "model.onnx", trust=True)
    assert measured["student"] == pytest.approx(metrics.student, abs=1e-3)


def test_comparison(small_file, tmp_path, capsys, one_thread):
    arguments = ["compare", str(small_file), "--methods=none,mgd-amp", "--seeds=1", f"--out={tmp_path / 'grid'}"]
    assert cli.main([*arguments, "--training.epochs=1"]) == 0
    shown = capsys.readouterr().out
    assert "none, seed 0: AP " in shown
    summary = json.loads((tmp_path / "grid" / "metrics.json").read_text())["summary"]
    assert [(entry["method"], entry["ap"]["interval"]) for entry in summary] == [("none", None), ("mgd-amp", None)]
    with (tmp_path / "grid" / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == ["method", "seed", "ap", "teacher_ap", "seconds"]


def test_taps(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--task=detection", "--image_size=64"]
    names = ["matchdistill.models:detector"] * 2
    own = [
        f'--{role}_options={{"backbone": "detectors:{kind}"}}'
        for role, kind in (("teacher", "WideBackbone"), ("student", "SmallBackbone"))
    ]
    assert cli.main(["taps", *names, *options, *own]) == 0
    shown = capsys.readouterr().out
    assert "layer4.0.relu2:input" in shown
    assert "64 -> 32" in shown


def test_bfloat16(small, tmp_path, monkeypatch):
    seen = []

    def recorded(self, batch, number, step=DetectionModule.training_step):
        loss = step(self, batch, number)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(DetectionModule, "training_step", recorded)
    for precision in ("32-true", "bf16-mixed"):
        arguments = (f"--trainer.precision={precision}", "--training.lr=0.001", "--teacher.weights=null")
        torch.manual_seed(0)
        fit(small(*arguments, *two_stages("faster_rcnn")), tmp_path / precision, quiet=True)
    single, half = seen[:4], seen[4:]
    assert half == pytest.approx(single, rel=0.05)
    assert half != single


def test_corrupt_images(small, tmp_path, coco):
    import shutil

    root = shutil.copytree(coco, tmp_path / "damaged")
    damaged = root / "train2017" / "003.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    arguments = (f"--data.root={root}", "--training.epochs=1")
    with pytest.raises(ValueError, match=r"003\.png"):
        fit(small(*arguments), tmp_path / "run", quiet=True)
    metrics = fit(small(*arguments, "--data.skip_corrupt=true"), tmp_path / "run", resume=True, quiet=True)
    assert metrics.corrupt_images == [str(damaged)]


RUNNER = """
import os, sys, torch
from matchdistill import cli
from matchdistill.tasks.detection.module import DetectionModule

seen = {"trained": [], "validated": [], "matchings": []}
step, validate, refresh = DetectionModule.training_step, DetectionModule.validation_step, DetectionModule.refresh

def training_step(self, batch, number):
    seen["trained"] += [int(target["image_id"]) for target in batch[1]]
    return step(self, batch, number)

def validation_step(self, batch, number):
    seen["validated"] += [int(target["image_id"]) for target in batch[1]]
    return validate(self, batch, number)

def recorded(self, loader):
    matchings = refresh(self, loader)
    seen["matchings"].append([(matching.index, matching.cost, matching.images) for matching in matchings])
    return matchings

DetectionModule.training_step, DetectionModule.validation_step = training_step, validation_step
DetectionModule.refresh = recorded
torch.set_num_threads(1)
code = cli.main(sys.argv[1:])
torch.save(seen, f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
sys.exit(code)
"""


@pytest.mark.slow
def test_two_processes(small_file, tmp_path):
    (tmp_path / "runner.py").write_text(RUNNER)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "runner.py", "fit", str(small_file), "--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments = [
        "--data.batch_size=2",
        "--data.masks=true",
        "--distillation.refresh_images=7",
        "--distillation.refresh_every=1",
        "--teacher.weights=null",
    ]
    arguments += [*two_stages("mask_rcnn"), "--out=run"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # Each epoch every image once, over both processes.
    assert sorted(first["trained"][:4] + second["trained"][:4]) == list(range(100, 108))
    half = len(first["validated"]) // 2, len(second["validated"]) // 2
    assert sorted(first["validated"][: half[0]] + second["validated"][: half[1]]) == list(range(100, 105))
    assert len(first["matchings"]) == 2
    for ours, theirs in zip(first["matchings"], second["matchings"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert one[2] == other[2] == 7
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "mask_ap" in measured["student"]


@pytest.mark.slow
def test_ssd(small, tmp_path):
    names = [f"--{role}.name=torchvision:ssdlite320_mobilenet_v3_large" for role in ("student", "teacher")]
    arguments = [
        *names,
        "--student.options={}",
        "--teacher.options={}",
        "--teacher.weights=null",
        "--training.epochs=1",
    ]
    recipe = small(*arguments)
    module = build_module(recipe)
    # The stages of MobileNet itself: SSD's own further levels are side exits. A fixed size of images, and no pyramid.
    assert [position.spatial[1] for position in module.distiller.positions] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert fit(recipe, tmp_path / "run", quiet=True).student["ap"] >= 0
    # That of VGG has images of another normalisation.
    with pytest.raises(ValueError, match=r"the teacher's image_mean is \[0.48.*the student's \[0.5"):
        build_module(small(*arguments, "--teacher.name=torchvision:ssd300_vgg16"))


def test_a_detector_of_ones_own(small, tmp_path):
    name = ("--student.name=detectors:own_detector", "--student.options={}", "--distillation.taps=auto")
    metrics = fit(small(*name, "--training.epochs=1"), tmp_path / "run", quiet=True)
    assert metrics.student["ap"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distillation.method=mgd-amp+kd"], r"method 'mgd-amp\+kd' distils the output of classifiers"),
        (["--distillation.refresh_steps=[[5, 2]]"], r"distillation.refresh_steps is \[\[5, 2\]\]: expected pairs"),
        (["--distillation.refresh_steps=[[0, 2], [9, 3], [4, 1]]"], "distillation.refresh_steps is"),
        (["--distillation.refresh_steps=[[0, -1]]"], "distillation.refresh_steps is"),
        (["--distillation.refresh_steps=[]"], "distillation.refresh_steps is"),
        (["--trainer.compile=true"], "trainer.compile is not for detection"),
        (["--teacher.engine=onnxruntime"], "teacher.engine is not for detection, whose images come in many sizes"),
        (["--training.warmup_steps=-1"], "training.warmup_steps is -1"),
        (["--teacher.train_limit=0"], "teacher.train_limit is 0"),
    ],
)
def test_values_that_do_not_fit(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.options.architecture=retinanett"], "architecture 'retinanett'.*did you mean 'retinanet'"),
        (
            ["--student.options.backbone=timm:vit_tiny_patch16_224"],
            "strides 16, 16, 16: a pyramid needs 4, 8, 16 and 32",
        ),
        (["--student.name=torchvision:resnet18", "--student.options={}"], "torchvision has no such detector"),
        (["--student.name=detectors:SmallBackbone", "--student.options={}"], "has no backbone: expected a detector"),
        (["--data.masks=true"], "the student's detections have no masks|the teacher's detections have no masks"),
        (
            ["--student.options.architecture=mask_rcnn"],
            "learns masks, which the data does not give: set data.masks to true",
        ),
        (
            [
                "--student.name=torchvision:keypointrcnn_resnet50_fpn",
                "--student.options={}",
                "--distillation.method=none",
            ],
            "learns keypoints, which the data has none of",
        ),
    ],
)
def test_networks_that_do_not_fit(small, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as info:
        fit(small(*arguments), tmp_path / "run", quiet=True)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_does_not_know_is_told(small_file, capsys):
    values = yaml.safe_load(small_file.read_text())
    values["data"] |= {"image_size": 3, "val_imagess": "x"}
    small_file.write_text(yaml.safe_dump(values))
    assert cli.main(["fit", str(small_file)]) == 2
    said = capsys.readouterr().err
    assert "unknown key 'data.image_size'" in said
    assert "did you mean 'data.val_images'" in said

"""The paper's detectors as packaged recipes. The numbers here are those of Yue et al., ECCV 2020, and its code."""

import json

import pytest

from detectors import FEW
from matchdistill import cli
from matchdistill.models import build_detector
from matchdistill.recipes import packaged
from matchdistill.runs.build import build_distiller
from matchdistill.runs.recipe import load_recipe, read_recipe
from matchdistill.tasks.optimizing import lr_factor, warmup_factor

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "warmup_epochs": 0, "warmup_steps": 1000}
ONE_X = {**SGD, "epochs": 12, "schedule": "steps", "milestones": [8, 11], "gamma": 0.1}
# name: first line, architecture, learning rate, student's depth, teacher's
RECIPES = {
    "coco_retinanet_r50_1x": ("37.01 / 56.03 AP / AP50 in the paper", "retinanet", 0.01, 50, None),
    "coco_retinanet_r18_1x": ("30.78 / 47.88 AP / AP50 in the paper", "retinanet", 0.01, 18, None),
    "coco_retinanet_r50_r18_1x": ("31.38 / 48.79 AP / AP50 in the paper", "retinanet", 0.01, 18, 50),
    "coco_maskrcnn_r50_1x": ("Mask R-CNN", "mask_rcnn", 0.02, 50, None),
    "coco_maskrcnn_r18_1x": ("Mask R-CNN", "mask_rcnn", 0.02, 18, None),
    "coco_maskrcnn_r50_r18_1x": ("Mask R-CNN", "mask_rcnn", 0.02, 18, 50),
}
DISTILLED = [name for name, (*_, teacher) in RECIPES.items() if teacher]
# The recipes' own code path at the size of a test.
SMALL = (
    "--data.batch_size=2",
    "--data.workers=0",
    "--student.options.backbone=detectors:SmallBackbone",
    "--student.options.backbone_weights=null",
    "--student.options.pyramid_channels=16",
    "--student.options.anchor_size=8",
    "--student.options.min_size=[48, 64]",
    "--student.options.max_size=96",
    "--training.epochs=1",
    "--training.warmup_steps=3",
    "--trainer.accelerator=cpu",
)
TEACHER = tuple(
    argument.replace("--student", "--teacher").replace("Small", "Wide").replace("--training", "--teacher.training")
    for argument in SMALL
    if argument.startswith(("--student", "--training"))
)
TAPS = [["layer1.1.relu2:input"] * 2, *([f"layer{stage}.0.relu2:input"] * 2 for stage in (2, 3, 4))]


@pytest.mark.parametrize("name", RECIPES)
def test_values(name):
    first, architecture, rate, depth, teacher = RECIPES[name]
    assert first in packaged()[name].splitlines()[0]
    recipe, values = load_recipe(name), read_recipe(name)
    assert values["training"] == {**ONE_X, "lr": rate}  # written there, whatever the defaults are
    assert (recipe.data.options.batch_size, recipe.data.options.masks) == (16, architecture == "mask_rcnn")
    networks = [(recipe.student, depth)] + ([(recipe.teacher, teacher)] if teacher else [])
    for network, layers in networks:
        assert network.options == {
            "architecture": architecture,
            "backbone": f"torchvision:resnet{layers}",
            "backbone_weights": "IMAGENET1K_V1",
            "frozen_stages": 1,
            "trained_norms": "last",
            "min_size": [640, 672, 704, 736, 768, 800],
            "max_size": 1333,
        }
    if not teacher:
        assert values["distillation"] == {"method": "none"}
        return
    assert values["teacher"]["training"] == {**ONE_X, "lr": rate}
    alone = read_recipe(name.replace("_r50_r18", "_r18"))
    assert [values[section] for section in ("data", "student", "training")] == [
        alone[section] for section in ("data", "student", "training")
    ]
    settings = recipe.distillation
    assert (settings.method, settings.norm, settings.loss_reduction) == ("mgd-amp", "group", "sum")
    assert settings.feature_weight == pytest.approx([1 / (5e7 * factor) for factor in (1, 1, 0.1, 0.1)])
    assert (settings.refresh_steps, settings.refresh_images) == ([[0, 5000], [20_000, 31_000]], 16 * 1000)


def test_schedule():
    training = load_recipe("coco_retinanet_r50_r18_1x").training
    assert [lr_factor(training, epoch) for epoch in (0, 7.9, 8, 10.9, 11)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [warmup_factor(training, step) for step in (0, 500, 1000)] == pytest.approx([0.001, 0.5005, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLED)
def test_positions_are_the_ends_of_c2_to_c5_with_margins_of_learned_norms(name):
    plain = [
        f"--{role}.options.{key}" for role in ("student", "teacher") for key in ("backbone_weights=null", "min_size=64")
    ]
    recipe = load_recipe(name, *plain)
    networks = [build_detector(each.name, 80, **each.options) for each in (recipe.teacher, recipe.student)]
    distiller = build_distiller(recipe, *networks)
    for number, position in enumerate(distiller.positions):
        widths = 256 * 2**number, 64 * 2**number
        assert (position.teacher_channels, position.student_channels) == widths
        assert position.index.shape == (widths[1], 4)
        assert position.margin_norm.startswith(f"layer{number + 1}.")
        assert position.norm.num_groups == 32
    assert len(distiller.positions) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_end_to_end(name, coco, tmp_path, capsys, one_thread):
    arguments = [*SMALL, f"--data.root={coco}"]
    if "maskrcnn" in name:
        roles = ("student", "teacher") if name in DISTILLED else ("student",)
        arguments += [f"--{role}.options.{key}={value}" for role in roles for key, value in FEW.items()]
    if name in DISTILLED:
        arguments += [*TEACHER, f"--distillation.taps={json.dumps(TAPS)}", "--distillation.refresh_steps=[[0, 2]]"]
    assert cli.main(["fit", name, *arguments, f"--out={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert shown.count("matching of") == (2 if name in DISTILLED else 0)  # 7 images with objects make 3 steps
    assert "AP50" in shown
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ("mask_ap" in metrics["student"]) == ("maskrcnn" in name)
    assert bool(metrics["teacher"]) == (name in DISTILLED)
    assert cli.main(["validate", str(tmp_path / "run"), "--trust"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--trust", "--out", str(tmp_path / "student.safetensors")]) == 0

"""The detection benchmark's networks, recipes, tables and costs."""

import itertools
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from benchmarks import detection_step as step
from benchmarks import harness
from matchdistill.models import weights_file
from matchdistill.runs.recipe import load_recipe
from scripts import script

detection = script("detection")


def test_weights_under_timms_names_are_the_same_network(tmp_path):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(detection.for_timm("lite0", tmp_path)))
    reference = theirs.from_name("efficientnet-lite0", image_size=64)
    reference.load_state_dict(torch.load(weights_file(detection.PRETRAINED["lite0"]), weights_only=True))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.eval()(images))


def test_the_committed_table_is_of_the_committed_results():
    results = json.loads((detection.RESULTS / "detection.json").read_text())
    assert detection.markdown(results) == (detection.RESULTS / "detection.md").read_text()
    for name, found in results["detectors"].items():
        options = found["recipe"]["student"]["options"]
        assert options["architecture"] == {"RetinaNet": "retinanet", "Mask R-CNN": "mask_rcnn"}[name]
        runs = {(run["method"], run["seed"]): run["student"]["ap"] for run in found["runs"]}
        for entry in found["summary"]["ap"]:
            assert len(entry["seeds"]) >= 2
            own = [runs[entry["method"], seed] for seed in entry["seeds"]]
            assert entry["ap"]["mean"] == pytest.approx(sum(own) / len(own))


def test_a_step_is_set_beside_its_parts(coco, monkeypatch):
    small = {"backbone": "detectors:SmallBackbone", "backbone_weights": "null", "pyramid_channels": 16, "min_size": 64}
    options = [f"--{role}.options.{key}={value}" for role in ("student", "teacher") for key, value in small.items()]
    recipe = load_recipe(
        step.RECIPES[0], f"--data.root={coco}", "--distillation.taps=auto", "--trainer.accelerator=cpu", *options
    )
    clock = itertools.cycle([2.0, 1.0, 3.3, 3.3, 1.0, 2.0])  # there and back
    works = []

    def timed(work, device, given):
        works.append(work)
        work()
        return next(clock)

    monkeypatch.setattr(harness, "timed", timed)
    found = step.measure(recipe, size=64, count=2, rounds=3)
    assert found["ratios"] == pytest.approx([1.1] * 3)
    assert found["seconds"] == {"alone": 2.0, "teacher": 1.0, "distilled": 3.3}
    assert works == [*works[:3], *works[2::-1], *works[:3]]
    assert len(set(works)) == 3

"""The transfer recipes on a few real images, with the real pre-trained weights."""

import json

import pytest
import torch

from matchdistill import cli
from matchdistill.data.tensors import DEBIAN_FASHION_MNIST
from matchdistill.models import build_model
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import load_recipe

pytest.importorskip("efficientnet_lite_pytorch")
pytestmark = [
    pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.usefixtures("one_thread"),
]


def test_teacher_student_pretraining_and_tests_share_no_image():
    student, narrow, pretraining = map(
        load_recipe, ("transfer_fashion_mnist", "transfer_fashion_mnist_narrow", "pretrain_fashion_mnist")
    )
    assert narrow.config["data"] == student.config["data"]
    assert narrow.config["teacher"] == student.config["teacher"]
    assert narrow.student.options == pretraining.student.options
    seen = []
    for recipe in (student.for_teacher(), student, pretraining):
        recipe.data.image_size = 4
        recipe.data.setup()
        seen.append({image.numpy().tobytes() for image in recipe.data.train_set.data.images.unbind()})
    # In 4 px some images of different items are alike; parts that overlapped would share thousands.
    assert [len(images) for images in seen] == pytest.approx([5_000, 1_000, 10_000], rel=0.02)
    assert all(len(seen[one] & seen[other]) < 60 for one, other in ((0, 1), (0, 2), (1, 2)))


def test_pretrained_networks():
    recipe = load_recipe("transfer_fashion_mnist")
    for model in (recipe.teacher, recipe.student):
        built = build_model(model.name, 10, model.weights, model.fresh_head, **model.options)
        fresh = build_model(model.name, 10, **model.options)
        assert built._fc.out_features == 10
        assert not torch.equal(built._bn1.running_var, fresh._bn1.running_var)


@pytest.mark.parametrize(
    ("name", "widths", "groups"),
    [
        ("transfer_fashion_mnist", [144, 240, 672, 1280], [1, 1, 1, 1]),
        ("transfer_fashion_mnist_narrow", [48, 96, 240, 448], [3, 3, 3, 2]),
    ],
)
def test_positions_that_are_found(name, widths, groups):
    """What lets the reductions coincide for the one student and differ for the other."""
    positions = build_module(load_recipe(name)).distiller.positions
    assert [position.student_channels for position in positions] == widths
    assert [position.index.shape[1] for position in positions] == groups
    assert [position.spatial for position in positions] == [((side, side),) * 2 for side in (16, 8, 4, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transfer_fashion_mnist", "transfer_fashion_mnist_narrow"])
def test_end_to_end(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--data.train_limit=64", "--data.val_part=null", "--data.val_limit=40", "--teacher.train_limit=64"]
    short = [f"--{part}.{key}" for part in ("training", "teacher.training") for key in ("epochs=1", "warmup_epochs=0")]
    if name.endswith("narrow"):
        pretrained = [
            "--training.epochs=1",
            "--training.warmup_epochs=0",
            "--data.train_limit=64",
            "--data.val_limit=40",
        ]
        assert cli.main(["fit", "pretrain_fashion_mnist", *pretrained]) == 0
        few.append("--student.weights=runs/pretrain_fashion_mnist/student.safetensors")
    assert cli.main(["compare", name, "--seeds=1", *few, *short]) == 0
    found = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
    assert [entry["method"] for entry in found["summary"]] == load_recipe(name).compare.methods
    cosines = {}
    for method in ("mgd-amp", "random-amp"):
        lines = (
            tmp_path / "runs" / name / "cells" / method / "seed0" / "logs" / "version_0" / "metrics.csv"
        ).read_text()
        header, *rows = (line.split(",") for line in lines.splitlines())
        cost = [row[header.index("matching/cost_0")] for row in rows]
        cosines[method] = 1 - float(next(filter(None, cost))) / 2
    assert cosines["mgd-amp"] > cosines["random-amp"] + 0.1

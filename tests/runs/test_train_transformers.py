"""A transformer from a convolutional teacher and the reverse, on class folders: from the images to a table, by commands."""

import csv
import json
import math

import pytest
from PIL import Image

from matchdistill import cli
from matchdistill.data.tensors import DEBIAN_FASHION_MNIST, FASHION_CLASSES, load_fashion_mnist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist"),
]

VIT = ("timm:vit_tiny_patch16_224", "{img_size: 32, patch_size: 8, embed_dim: 48, depth: 3}")
RESNET = ("timm:resnet10t", "{}")
ADAMW = "{optimizer: adamw, lr: 0.002, schedule: cosine, epochs: 3}"
SGD = "{optimizer: sgd, lr: 0.05, schedule: cosine, epochs: 3}"


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """The first 300 training and 100 validation images as class folders."""
    root = tmp_path_factory.mktemp("fashion")
    for split, images, count in zip(
        ("train", "val"), load_fashion_mnist(DEBIAN_FASHION_MNIST), (300, 100), strict=True
    ):
        for number in range(count):
            folder = root / split / FASHION_CLASSES[images.labels[number]].replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[number].numpy()).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("method", ["kd", "mgd-amp+kd"])
@pytest.mark.parametrize(
    ("teacher", "student", "first", "second"),
    [pytest.param(RESNET, VIT, SGD, ADAMW, id="ViT"), pytest.param(VIT, RESNET, ADAMW, SGD, id="ResNet")],
)
def test_from_folders_to_a_table(fashion, tmp_path, monkeypatch, capsys, method, teacher, student, first, second):
    monkeypatch.chdir(tmp_path)
    given = {
        "data.name": "folder",
        "data.root": fashion,
        "data.image_size": 32,
        "data.batch_size": 30,
        "data.crop_scale": "[0.6, 1]",
        "teacher.name": teacher[0],
        "teacher.options": teacher[1],
        "teacher.training": first,
        "student.name": student[0],
        "student.options": student[1],
        "training": second,
        "distillation.method": method,
        "trainer.accelerator": "cpu",
    }
    (tmp_path / "empty.yaml").write_text("{}")
    assert cli.main(["fit", "empty.yaml", "--out=run", *(f"--{key}={value}" for key, value in given.items())]) == 0
    assert cli.main(["export", "run", "--format=onnx", "--out=student.onnx"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for source in ("run", "student.onnx"):
        assert cli.main(["predict", source, str(fashion / "val"), "--out=found.csv"]) == 0, capsys.readouterr()
        with (tmp_path / "found.csv").open() as file:
            rows = list(csv.DictReader(file))
        hits = [row["label"] == row["path"].split("/")[-2] for row in rows]
        assert len(hits) == 100
        # Equal logits of an export may be rounded to another order.
        assert math.isclose(sum(hits) / 100, metrics["student"]["top1"], abs_tol=1e-6 if source == "run" else 0.011)
        assert all(0.1 < float(row["score"]) <= 1 for row in rows)
    assert metrics["teacher"]["top1"] > 0.2
    assert metrics["student"]["top1"] > 0.2

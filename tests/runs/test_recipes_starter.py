"""Starter recipes for data of your own: five values to change, and a run of each as it stands on a tiny folder."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from matchdistill import cli
from matchdistill.recipes import packaged
from matchdistill.runs.metrics import read_metrics

STARTERS = {name: text for name, text in packaged().items() if name.startswith("starter_")}
SHORT = [
    "--training.epochs=1",
    "--training.warmup_epochs=0",
    "--training.warmup_steps=0",
    "--trainer.accelerator=cpu",
    "--data.workers=0",
    "--data.batch_size=4",
]
TRAINED = ["--teacher.training.epochs=1", "--teacher.training.warmup_epochs=0", "--teacher.training.warmup_steps=0"]
SMALL = ["--data.image_size=64", "--teacher.weights=null", "--student.weights=null"]
DETECTOR = {"backbone_weights": "null", "min_size": "64", "max_size": "96"}
OPTIONS = {
    "classification": [*TRAINED, *SMALL],
    "transfer": [*TRAINED, *SMALL],
    "features": SMALL,
    "detection": [
        *TRAINED,
        *(f"--{role}.options.{key}={value}" for role in ("teacher", "student") for key, value in DETECTOR.items()),
        "--data.train_images=train2017",
        "--data.train_annotations=annotations/instances_train2017.json",
        "--data.val_images=val2017",
        "--data.val_annotations=annotations/instances_val2017.json",
    ],
    "segmentation": [
        *TRAINED,
        "--data.crop=[48,48]",
        *(f"--{role}.options.weights_backbone=null" for role in ("teacher", "student")),
    ],
}


@pytest.fixture(scope="session")
def birds(tmp_path_factory):
    """Class folders of noise in two shades, of sizes that differ."""
    root, chance = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    for number in range(12):
        path = root / ("train" if number < 8 else "val") / ("robin", "wren")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = 150 * (number % 2)
        pixels = chance.integers(shade, shade + 90, (70 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def test_one_for_each_kind_of_data():
    assert {name.removeprefix("starter_") for name in STARTERS} == set(OPTIONS)


@pytest.mark.parametrize("name", STARTERS)
def test_five_values_are_marked(name):
    marked = [line for line in STARTERS[name].splitlines() if re.search(r": .+# \(\d\) \S", line)]
    assert sorted(re.findall(r"# \((\d)\)", STARTERS[name])) == [*"12345"]
    assert len(marked) == 5
    assert {line.split(":")[0].strip() for line in marked} >= {"root", "batch_size", "epochs"}
    assert f"matchdistill recipes copy {name} mine.yaml" in STARTERS[name]
    values = yaml.safe_load(STARTERS[name])
    assert values["data"]["root"] == "data"
    assert values["compare"]["methods"][0] == "none"


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTERS)
@pytest.mark.filterwarnings("ignore")
def test_they_run_with_their_own_networks(name, request, tmp_path, monkeypatch, one_thread):
    """Without weights, which are downloaded, and on small images."""
    kind = name.removeprefix("starter_")
    root = request.getfixturevalue({"detection": "coco", "segmentation": "pixels"}.get(kind, "birds"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", name, "mine.yaml"]) == 0
    assert cli.main(["fit", "mine.yaml", "--out=run", f"--data.root={root}", *SHORT, *OPTIONS[kind]]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics.method == yaml.safe_load(STARTERS[name])["distillation"]["method"]
    assert metrics.student

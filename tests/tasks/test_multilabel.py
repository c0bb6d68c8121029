"""Images with any number of labels: where they are read from, what is learned and measured, and what is found."""

import csv
import itertools
import json
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from matchdistill import Predictor, cli
from matchdistill.data import LabelsData
from matchdistill.models import load_weights, small_resnet
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit
from matchdistill.tasks.multilabel.module import MultilabelLoss, MultilabelModule, binary_kd_loss
from matchdistill.tasks.multilabel.predicting import Labelled

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

NAMES = ["blue", "green", "red"]
SETS = [names for count in range(4) for names in itertools.combinations(NAMES, count)]
OWN = """
from pathlib import Path
import torch
from PIL import Image

class Colours(torch.utils.data.Dataset):
    def __init__(self, root, rows, kind):
        self.root, self.rows, self.kind = Path(root), rows, kind

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        path, names = self.rows[index]
        vector = [int(name in names) for name in ("blue", "green", "red")]
        return Image.open(self.root / path), {"list": vector, "tensor": torch.tensor(vector).float()}[self.kind]

def colours(root, kind="list"):
    rows = [line.split(",") for line in (Path(root) / "table.csv").read_text().splitlines()[1:]]
    train, val = ([(path, names.split("|")) for path, names, split in rows if split == kept] for kept in ("train", "val"))
    return Colours(root, train, kind), Colours(root, val, kind), ["blue", "green", "red"]
"""


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Images that are any of blue, green and red, or none of them: a table, and an own set beside it."""
    root = tmp_path_factory.mktemp("colours")
    rows = ["path,label,split"]
    for split, count in (("train", 6), ("val", 3)):
        for place, names in enumerate(SETS):
            for number in range(count):
                noise = np.random.default_rng([place, number, count]).integers(0, 60, (20, 18, 3))
                noise[..., [2 - NAMES.index(name) for name in names]] += 150
                path = f"{split}{place}_{number}.png"
                Image.fromarray(noise.astype(np.uint8)).save(root / path)
                rows.append(f"{path},{'|'.join(reversed(names))},{split}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    (root / "colours17.py").write_text(OWN)
    return root


def batches(**options):
    data = LabelsData(image_size=16, batch_size=8, **options)
    data.setup()
    return data, [*data.train_dataloader(), *data.val_dataloader()]


@pytest.fixture
def expected(colours):
    return batches(root=colours / "table.csv")


def assert_same_data(found, expected):
    assert found[0].class_names == expected[0].class_names == NAMES
    assert len(found[1]) == len(expected[1])
    for first, second in zip(found[1], expected[1], strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_a_table(colours, expected):
    data, found = expected
    rows = {row["path"]: row["label"] for row in csv.DictReader((colours / "table.csv").open())}
    for images in (data.train_set, data.val_set):
        for path, label in zip(images.paths, images.files.labels, strict=True):
            names = rows[path.rpartition("/")[2]].split("|")
            assert label.tolist() == [int(name in names) for name in NAMES]
    assert all(labels.shape == (len(images), 3) for images, labels in found)


def test_another_separator_and_parquet(colours, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = list(csv.DictReader((colours / "table.csv").open()))
    table = {name: [row[name] for row in rows] for name in ("path", "label", "split")}
    table["label"] = [label.replace("|", " ; ") for label in table["label"]]
    path = colours / "table.parquet"
    parquet.write_table(pyarrow.table(table), path)
    assert_same_data(batches(root=path, label_separator=";"), expected)


@pytest.mark.parametrize("named", [True, False])
def test_a_data_set_of_hugging_face(colours, expected, tmp_path, named):
    datasets = pytest.importorskip("datasets")
    rows = list(csv.DictReader((colours / "table.csv").open()))
    kind = datasets.ClassLabel(names=NAMES) if named else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Sequence(kind)})
    splits = {}
    for split in ("train", "val"):
        own = [row for row in rows if row["split"] == split]
        labels = [[name for name in row["label"].split("|") if name] for row in own]
        values = {"image": [str(colours / row["path"]) for row in own], "labels": labels}
        splits[split] = datasets.Dataset.from_dict(values, features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    column = {} if named else {"label_column": "labels"}
    assert_same_data(batches(name="datasets", root=tmp_path / "saved", **column), expected)


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_set_of_ones_own(colours, expected, monkeypatch, kind):
    monkeypatch.chdir(colours)
    found = batches(name="colours17:colours", root=colours, options={"kind": kind})
    assert_same_data(found, expected)
    assert (found[0].code, expected[0].code) == ("colours17:colours", "")  # by which commands ask for trust
    sys.modules.pop("colours17", None)


def test_a_share_for_validation_and_a_part(colours, tmp_path):
    text = (colours / "table.csv").read_text().splitlines()
    path = colours / "train_only.csv"
    path.write_text("\n".join(line for line in text if not line.endswith("val")) + "\n")
    with pytest.warns(
        UserWarning, match=r"5 of its 48 training images are taken out for validation \(data.val_share\)"
    ):
        data, _ = batches(root=path)
    assert (len(data.train_set), len(data.val_set)) == (43, 5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("train0_0.png,blue||red,train", r"row 1 .*has the label 'blue\|\|red': expected names with '\|' between them"),
        ("val0_0.png,yellow,val", "has validation images of classes without training images: yellow"),
    ],
)
def test_labels_that_cannot_be(colours, row, said):
    path = colours / "wrong.csv"
    path.write_text(f"path,label,split\n{row}\ntrain1_0.png,blue,train\n")
    with pytest.raises(ValueError, match=said):
        batches(root=path)


def test_vectors_that_cannot_be(colours, monkeypatch):
    monkeypatch.chdir(colours)
    (colours / "wrong17.py").write_text(
        OWN.replace('"green", "red")]', '"green")]').replace("colours(root", "few(root")
    )
    with pytest.raises(ValueError, match=r"has the label \[.*: expected 3 numbers, each 0 or 1"):
        batches(name="wrong17:few", root=colours)


def test_the_losses_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=draw, requires_grad=True) for _ in range(2))
    labels = torch.randint(2, (4, 3), generator=draw, dtype=torch.uint8)
    loss = sum(-F.logsigmoid(s if y else -s) for s, y in zip(student.flatten(), labels.flatten(), strict=True)) / 12
    torch.testing.assert_close(MultilabelLoss()(student, labels), loss)

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        kinds = [torch.distributions.Bernoulli(logits=logits / 2.0) for logits in (t.detach(), s)]
        return 4 * torch.distributions.kl_divergence(*kinds).mean()

    torch.testing.assert_close(binary_kd_loss(student, teacher, 2.0), divergence(student, teacher))
    binary_kd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


RECIPE = {
    "task": "multilabel",
    "data": {"image_size": 16, "batch_size": 8, "crop_scale": [0.7, 1.0]},
    "teacher": {
        "name": "matchdistill.models:small_resnet",
        "options": {"width": 8},
        "training": {"epochs": 3, "lr": 0.05},
    },
    "student": {"name": "matchdistill.models:small_resnet", "options": {"width": 4}},
    "training": {"epochs": 4, "lr": 0.05, "schedule": "cosine", "keep_best": True},
    "trainer": {"accelerator": "cpu", "log_every": 1},
}


@pytest.fixture(scope="module")
def run(colours, tmp_path_factory):
    """A run of two networks, trained to find colours."""
    folder = tmp_path_factory.mktemp("run")
    values = {**RECIPE, "data": {**RECIPE["data"], "root": str(colours / "table.csv")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    fit(load_recipe(folder / "recipe.yaml", "--distillation.method=mgd-amp+kd"), folder / "run", quiet=True)
    return folder


def test_a_class_that_no_image_has_is_not_measured():
    shares = torch.tensor([[0.9, 0.2, 0.8], [0.1, 0.7, 0.6], [0.3, 0.9, 0.7]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    measure = MultilabelModule.measure_of(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure.update(shares, labels)
        found = measure.compute()["mean_ap"]
    expected = [average_precision_score(labels[:, at].numpy(), shares[:, at].numpy()) for at in (0, 1)]
    assert found.item() == pytest.approx(sum(expected) / 2)
    nothing = Labelled("a.png", [], [])
    assert (nothing.label, nothing.score, nothing.rows()) == ("", 0.0, [["a.png", "", ""]])


def test_validation_images_without_any_class_are_refused(tmp_path, colours):
    lines = (colours / "table.csv").read_text().splitlines()
    split = lines[0].split(",").index("split"), lines[0].split(",").index("label")
    rows = [line.split(",") for line in lines[1:]]
    for row in rows:
        row[split[1]] = "" if row[split[0]] == "val" else row[split[1]]
    table = colours / "unlabelled.csv"
    table.write_text("\n".join([lines[0], *map(",".join, rows)]))
    with pytest.raises(ValueError, match="no validation image has any class"):
        batches(root=table)


def test_the_metric_is_scikit_learns(run, colours):
    data, _ = batches(root=colours / "table.csv")
    network = small_resnet(3, width=4)
    load_weights(network, run / "run" / "student.safetensors")
    with torch.no_grad():
        found = [(network.eval()(images).sigmoid(), labels) for images, labels in data.val_dataloader()]
    shares, labels = (torch.cat(values) for values in zip(*found, strict=True))
    metrics = json.loads((run / "run" / "metrics.json").read_text())
    expected = average_precision_score(labels.numpy(), shares.numpy(), average="macro")
    assert metrics["student"] == {"mean_ap": pytest.approx(expected, abs=1e-6)}
    assert metrics["student"]["mean_ap"] > 0.75 < metrics["teacher"]["mean_ap"]
    assert json.loads((run / "run" / "evidence" / "best.json").read_text())["student"]["mean_ap"] >= expected - 1e-6


def test_every_command(run, colours, monkeypatch, capsys):
    monkeypatch.chdir(run)
    assert cli.main(["validate", "run"]) == 0
    metrics = json.loads((run / "run" / "metrics.json").read_text())
    assert f"{100 * metrics['student']['mean_ap']:.2f}%" in capsys.readouterr().out
    assert cli.main(["export", "run"]) == 0
    config = json.loads((run / "run" / "export" / "config.json").read_text())
    assert (config["task"], config["label_names"]) == ("multilabel", NAMES)
    data, _ = batches(root=colours / "table.csv")
    network = small_resnet(3, width=4)
    load_weights(network, run / "run" / "student.safetensors")
    for source in ("run", "run/export"):
        assert cli.main(["predict", source, str(colours), "--out=found.csv", "--draw=drawn"]) == 0, capsys.readouterr()
        with (run / "found.csv").open() as file:
            rows = {row["path"].rpartition("/")[2]: row for row in csv.DictReader(file)}
        assert len(rows) == 72
        for path, (image, _) in zip(data.val_set.paths, data.val_set, strict=True):
            with torch.no_grad():
                shares = network.eval()(image[None]).sigmoid()[0]
            row = rows[path.rpartition("/")[2]]
            known = {name: share for name, share in zip(NAMES, shares.tolist(), strict=True) if share >= 0.5}
            found = (
                dict(zip(row["label"].split("|"), map(float, row["score"].split("|")), strict=True))
                if row["label"]
                else {}
            )
            assert found == pytest.approx(known, abs=1e-5)
            assert list(found.values()) == sorted(found.values(), reverse=True)
    (found,) = Predictor("run", top=1)([colours / "val7_0.png"])
    assert len(found.labels) == 1
    assert found.plain(0) == [{"path": found.path, "labels": found.labels, "scores": found.scores}]


def test_an_exported_student_of_timm_is_one_of_labels(run, colours, monkeypatch):
    monkeypatch.chdir(run)
    options = (
        "--student.name=timm:resnet10t",
        "--student.options={}",
        "--distillation.method=none",
        "--training.epochs=1",
    )
    fit(load_recipe(run / "recipe.yaml", *options), run / "timm", quiet=True)
    assert cli.main(["export", "timm"]) == 0
    assert Predictor("timm/export")([colours / "val0_0.png"])[0].plain(0)[0].keys() == {"path", "labels", "scores"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--training.mixup=1"],
            "training.mixup is for images with one label each, not for multilabel: leave it out",
        ),
        (["--data.name=folder"], "data.name is 'folder': expected csv, datasets or package.module:function"),
        (["--data.label_separator="], "data.label_separator is empty"),
    ],
)
def test_what_is_refused(run, arguments, said):
    with pytest.raises(ValueError, match=said) as info:
        load_recipe(run / "recipe.yaml", *arguments)
    assert "\n" not in str(info.value)

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from trees import refusal, set_up

from matchdistill.data.hub import HubSet, Row

datasets = pytest.importorskip("datasets", reason="data sets of Hugging Face are read by their library")

pytestmark = pytest.mark.filterwarnings("ignore:.*validation images")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Nothing is cached elsewhere, nothing is asked of a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(labels, kind=None, **columns):
    content = {"image": [{"bytes": png(20 * i), "path": None} for i in range(len(labels))], "label": labels, **columns}
    features = datasets.Features(
        image=datasets.Image(),
        label=kind or datasets.ClassLabel(names=["bee", "wasp"]),
        **{name: datasets.Value("string") for name in columns},
    )
    return datasets.Dataset.from_dict(content, features=features)


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder / "set")
    return folder / "set"


def labels_of(data):
    return [dataset.files.labels.tolist() for dataset in (data.train_set, data.val_set)]


def test_a_saved_set_comes_by_class(tmp_path):
    root = saved(tmp_path, train=rows([1, 0, 1, 0], note=list("abcd")), validation=rows([1, 0], note=list("ab")))
    data = set_up("datasets", root, image_size=16, augment=False)
    assert (labels_of(data), data.class_names) == ([[0, 0, 1, 1], [0, 1]], ["bee", "wasp"])
    images, _ = data.train_set.__getitems__([0, 1, 2, 3])
    assert ((images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255).round().tolist() == [20, 60, 0, 40]


def test_one_saved_split(tmp_path):
    rows([0, 1] * 4).save_to_disk(tmp_path / "one")
    assert labels_of(set_up("datasets", tmp_path / "one", val_share=0.25)) == [[0] * 3 + [1] * 3, [0, 1]]


@pytest.mark.parametrize(("kind", "values"), [("string", ["wasp", "bee"]), ("int64", [7, 5])])
def test_labels_of_other_types(tmp_path, kind, values):
    root = saved(tmp_path, train=rows(values * 2, datasets.Value(kind)), test=rows(values, datasets.Value(kind)))
    data = set_up("datasets", root, label_column="label", val_split="test")
    assert (labels_of(data), data.class_names) == ([[0, 0, 1, 1], [0, 1]], sorted(map(str, values)))


def test_a_folder_of_images(image_root):
    for path in image_root.rglob("*.*"):
        if path.name in (".hidden.png", "notes.txt"):
            path.unlink()
    shutil.rmtree(image_root / "train" / ".cache")
    for path in list(image_root.rglob("0.jpg")):  # the library takes the innermost folder for the class
        path.rename(path.parents[2] / path.name)
    data, folders = (set_up(name, image_root, image_size=16, augment=False) for name in ("datasets", "folder"))
    assert labels_of(data) == labels_of(folders)
    everything = list(range(12))
    assert torch.equal(data.train_set.__getitems__(everything)[0], folders.train_set.__getitems__(everything)[0])


def test_a_parquet_file_of_images(tmp_path):
    rows([0, 1] * 4).to_parquet(tmp_path / "set.parquet")
    assert labels_of(set_up("datasets", tmp_path / "set.parquet")) == [[0] * 3 + [1] * 3, [0, 1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_rows_are_skipped(tmp_path, workers):
    train = rows([0, 1, 0, 1])
    content = [{"bytes": b"no image", "path": None}, *train.cast_column("image", datasets.Image(decode=False))["image"]]
    bad = datasets.Dataset.from_dict({"image": content, "label": [0, 0, 1, 0, 1]}, features=train.features)
    root = saved(tmp_path, train=bad, val=train)
    data = set_up("datasets", root, image_size=16, skip_corrupt=True, workers=workers, batch_size=5)
    assert [len(labels) for _, labels in data.train_dataloader()] == [4]
    assert data.corrupt == [f"of row 0 of the split 'train' of {root}"]
    with pytest.raises(ValueError, match="the row has none"):
        Row([{"image": None}], 0, "x").open()
    with pytest.raises(ValueError, match="the split 'train' of set has no images"):
        HubSet(Path("set"), {})._rows(rows([]), "train", "image", "label", None)


def test_what_a_set_may_lack(tmp_path):
    root = saved(tmp_path, train=rows([0, 1]), validation=rows([0, 1], datasets.ClassLabel(names=["wasp", "bee"])))
    assert "columns 'image' and 'label' are not of the same type, with the same classes" in refusal("datasets", root)
    for options, message in [
        (
            {"train_split": "trian"},
            "has no split 'trian'; its splits are 'train', 'validation': .* data.train_split; did you mean 'train'",
        ),
        ({"val_split": "test"}, "has no split 'test'; its splits are .* data.val_split"),
        ({"image_column": "img"}, "has no column 'img'; its columns are 'image', 'label'; did you mean 'image'"),
    ]:
        with pytest.raises(ValueError, match=message):
            set_up("datasets", root, **options)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda: rows([0, -1]), "the split 'train' of .*, row 1 has the label -1 .column 'label'.: expected a class"),
        (lambda: rows([0, None]), "row 1 has the label None"),
        (
            lambda: rows([0, 1], datasets.Value("int64")),
            "has 0 columns of the type ClassLabel, expected one: .*data.label_",
        ),
        (
            lambda: rows([0]).rename_column("image", "x").add_column("image", ["a"]).remove_columns("x"),
            "0 columns of the t",
        ),
    ],
)
def test_what_rows_may_lack(tmp_path, train, message):
    with pytest.raises(ValueError, match=message) as info:
        set_up("datasets", saved(tmp_path, train=train()))
    assert "\n" not in str(info.value)


def test_sets_that_cannot_be_loaded(tmp_path, monkeypatch):
    assert "cannot be loaded (ValueError: there is no such folder or file)" in refusal("datasets", tmp_path / "none")
    (tmp_path / "a.txt").write_text("")
    assert "expected a file that ends in .parquet, .arrow, .json" in refusal("datasets", tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    assert "empty cannot be loaded (" in refusal("datasets", tmp_path / "empty")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "a.parquet cannot be loaded (" in refusal("datasets", tmp_path / "a.parquet")
    assert "for a name of the Hub the network connection" in refusal("datasets", "nobody/nothing-of-this-name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("datasets", tmp_path) == "data.name is 'datasets': pip install 'matchdistill[datasets]'"

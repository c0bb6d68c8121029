"""The same images give the same run, whatever they lie in."""

import csv
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.fixture
def folders(tmp_path):
    """Class folders of 2 classes with 12 training and 6 validation images."""
    root = tmp_path / "insects"
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("bee", "wasp")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(90, (24, 20, 3), generator=torch.Generator().manual_seed(number))
                Image.fromarray((noise + 120 * label).byte().numpy()).save(folder / f"{number}.png")
    return root


def images_of(root):
    """Of each image its path, class and split."""
    return [(path, path.parts[-2], path.parts[-3]) for path in sorted(root.rglob("*.png"))]


def as_csv(root):
    with (root / "all.csv").open("w", newline="") as file:
        rows = [(path.relative_to(root), label, split) for path, label, split in reversed(images_of(root))]
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return "csv", root / "all.csv"


def as_parquet(root):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    from pyarrow import parquet

    rows = [(str(path.relative_to(root)), label, split) for path, label, split in images_of(root)]
    columns = dict(zip(("path", "label", "split"), map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), root / "all.parquet")
    return "csv", root / "all.parquet"


OWN = """
from PIL import Image
from torch.utils.data import Dataset

class Insects(Dataset):
    def __init__(self, root, split):
        self.paths = sorted((root / split).rglob("*.png"))
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        return Image.open(self.paths[index]), ["bee", "wasp"].index(self.paths[index].parent.name)

def insects(root):
    from pathlib import Path
    return Insects(Path(root), "train"), Insects(Path(root), "val"), ["bee", "wasp"]
"""


def as_own_set(root):
    Path("myinsects.py").write_text(OWN)
    return "myinsects:insects", root


def as_saved_set(root):
    datasets = pytest.importorskip("datasets", reason="data sets of Hugging Face are read by their library")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bee", "wasp"]))
    splits = {}
    for split in ("train", "val"):
        found = [(str(path), label) for path, label, part in images_of(root) if part == split]
        paths, labels = map(list, zip(*found, strict=True))
        splits[split] = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    return "datasets", root / "saved"


def as_shards(root):
    for number in range(2):
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}-{number}.tar", "w") as archive:
                for path, label, _ in [image for image in images_of(root) if image[2] == split][number::2]:
                    key = path.relative_to(root).with_suffix("")
                    archive.add(path, f"{key}.png")
                    (root / "label").write_text(label)
                    archive.add(root / "label", f"{key}.cls")
    return "webdataset", root


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_saved_set, as_shards, as_own_set])
def test_a_run_is_the_same_to_the_bit_as_from_class_folders(tiny, folders, tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def weights(out, name, root, *arguments):
        options = ("--data.image_size=16", "--data.batch_size=8", "--data.train_limit=null", "--data.val_limit=null")
        method = ("--distillation.method=mgd-amp", "--teacher.weights=null", "--training.epochs=1")
        fit(tiny(f"--data.name={name}", f"--data.root={root}", *options, *method, *arguments), tmp_path / out)
        return (tmp_path / out / "student.safetensors").read_bytes()

    assert weights("other", *write(folders)) == weights("folders", "folder", folders)

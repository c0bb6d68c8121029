"""Whatever images lie in, they are read by one rule."""

import csv
import tarfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset
from trees import set_up

RNG = np.random.default_rng(0)


def write_all(folder):
    """An image of each kind that the table of rules names."""
    folder.mkdir(parents=True)
    colours = Image.fromarray(RNG.integers(256, size=(6, 9, 3), dtype=np.uint8))
    Image.fromarray(RNG.integers(65536, size=(6, 9), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(RNG.random((6, 9), dtype=np.float32)).save(folder / "float.tiff")
    colours.quantize(8).save(folder / "palette.png")
    colours.convert("CMYK").save(folder / "inks.tiff")
    colours.convert("LA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    colours.save(folder / "turned.jpg", exif=exif)
    colours.save(folder / "moving.gif", save_all=True, append_images=[colours.rotate(180)])


class Opened(Dataset):
    def __init__(self, root, split):
        self.paths = sorted((root / split / "all").iterdir())

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), 0


def opened(root):
    from pathlib import Path

    return Opened(Path(root), "train"), Opened(Path(root), "val"), ["all"]


def in_table(root):
    with (root / "all.csv").open("w", newline="") as file:
        paths = [path.relative_to(root) for path in root.glob("*/*/*")]
        csv.writer(file).writerows([("path", "label", "split"), *((path, "all", path.parts[0]) for path in paths)])
    return "csv", root / "all.csv"


def in_shards(root):
    (root / "label").write_text("all")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for path in (root / split / "all").iterdir():
                archive.add(path, path.name)
                archive.add(root / "label", f"{path.stem}.cls")
    return "webdataset", root


def in_saved_set(root):
    datasets = pytest.importorskip("datasets", reason="data sets of Hugging Face are read by their library")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["all"]))
    splits = {}
    for split in ("train", "val"):
        paths = sorted(map(str, (root / split / "all").iterdir()))
        columns = {"image": paths, "label": [0] * len(paths)}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    return "datasets", root / "saved"


def in_function(root):
    return "test_doors:opened", root


@pytest.mark.parametrize("put", [in_table, in_shards, in_saved_set, in_function])
def test_images_of_every_kind_are_read_as_from_class_folders(tmp_path, put):
    root = tmp_path / "images"
    for split in ("train", "val"):
        write_all(root / split / "all")
    folders, other = set_up("folder", root), set_up(*put(root))
    for name in ("train_set", "val_set"):
        files, others = getattr(folders, name).files, getattr(other, name).files
        assert len(files.paths) == len(others.paths) == 7
        for path, place in zip(files.paths, others.paths, strict=True):
            expected, got = folders.read(path), other.read(place)
            assert got.orientation == expected.orientation
            assert np.array_equal(np.asarray(got.image), np.asarray(expected.image)), path

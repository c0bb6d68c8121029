import functools
import shutil
import tarfile
from pathlib import Path

import pytest
from torchvision.datasets import imagenet
from trees import SYNSETS, TRUTH, refusal, set_up, write_imagenet_archives

from matchdistill.data import ImageData

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with ImageNet's archives in miniature."""
    monkeypatch.setattr(imagenet, "ARCHIVE_META", write_imagenet_archives(tmp_path))
    return tmp_path


imagenet_data = functools.partial(set_up, "imagenet", image_size=8, batch_size=4)
error_of = functools.partial(refusal, "imagenet")


def by_class(dataset, names):
    """class folder -> names of its images; the labels must say the same as the folders."""
    found = {}
    for path, label in zip(dataset.files.paths, dataset.files.labels.tolist(), strict=True):
        assert Path(path).parent.name == names[label]
        found.setdefault(names[label], []).append(Path(path).name)
    return found


def check(data):
    assert data.class_names == ["n01", "n02", "n03"]
    train = {wnid: [f"{wnid}_{i}.JPEG" for i in range(4)] for wnid in data.class_names}
    assert by_class(data.train_set, data.class_names) == train
    wnids = {number: wnid for number, wnid, *_ in SYNSETS}
    val = by_class(data.val_set, data.class_names)
    assert {name: wnid for wnid, names in val.items() for name in names} == {
        f"ILSVRC2012_val_{i:08}.JPEG": wnids[number] for i, number in enumerate(TRUTH, 1)
    }


def test_archives_are_extracted_once(archives, capfd):
    ImageData("imagenet", archives).prepare_data()
    assert capfd.readouterr().err.count("extracting") == 2
    check(imagenet_data(archives))
    assert next(iter(imagenet_data(archives).val_dataloader()))[0].shape == (3, 3, 8, 8)
    for name in (TRAIN, VAL, DEVKIT):
        (archives / name).unlink()
    check(imagenet_data(archives))
    assert capfd.readouterr().err == ""
    assert [path.name for path in archives.iterdir() if path.suffix != ".lock"] in (["train", "val"], ["val", "train"])
    assert ImageData("imagenet", archives).image_size == 224


def test_setup_extracts_what_is_absent(archives, monkeypatch):
    imagenet_data(archives)
    (archives / "val").rename(archives / "valid")
    (archives / VAL).unlink()
    shutil.rmtree(archives / "train")
    monkeypatch.chdir(archives.parent)
    check(imagenet_data(archives.name))


def test_class_folders_as_of_any_images(image_root):
    data = imagenet_data(image_root)
    assert (data.class_names, len(data.train_set), len(data.val_set)) == (["cat", "dog"], 12, 6)
    (image_root / "val" / "dog").rename(image_root / "val" / "wolf")
    assert "must have the same class folders" in error_of(image_root)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ([TRAIN], f"has no train/ and to extract it no {TRAIN}"),
        ([VAL], f"has no val/ or valid/ or validation/ and to extract it no {VAL}"),
        ([DEVKIT], f"validation/ and to extract it no {DEVKIT}"),
        (
            [TRAIN, VAL, DEVKIT],
            f"no {TRAIN}, no val/ or valid/ or validation/ and to extract it no {VAL} and no {DEVKIT}",
        ),
    ],
)
def test_missing_archives_are_told_before_anything_is_extracted(archives, gone, said):
    for name in gone:
        (archives / name).unlink()
    assert said in error_of(archives)
    assert not (archives / "train").exists()
    assert not (archives / "val").exists()


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_damaged_archive(archives, name):
    path = archives / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert error_of(archives).startswith(f"{path} is damaged or not the official file")
    assert not (archives / "val").exists()
    assert not list(archives.glob(".*.partial"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_interrupted_extraction_is_done_anew(archives, monkeypatch, split):
    parse = f"parse_{split}_archive"
    original = getattr(imagenet, parse)

    def killed(root, **options):
        original(root, **options)
        shutil.rmtree(Path(root) / split / "n01")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, parse, killed)
        with pytest.raises(KeyboardInterrupt):
            imagenet_data(archives)
    assert not (archives / split).exists()
    check(imagenet_data(archives))


def test_full_disk(archives, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imagenet, "parse_train_archive", full)
    assert "cannot be extracted into" in error_of(archives)
    assert "No space left on device" in error_of(archives)


def test_flat_validation_images(archives):
    imagenet_data(archives)
    shutil.rmtree(archives / "val")
    (archives / "val").mkdir()
    with tarfile.open(archives / VAL) as tar:
        tar.extractall(archives / "val", filter="data")
    message = error_of(archives)
    assert f"{archives / 'val'} is half extracted, ILSVRC2012_val_00000001.JPEG is in no class folder" in message
    assert f"extracted anew from {VAL} with {DEVKIT} in {archives}" in message
    (archives / VAL).rename(archives / "elsewhere.tar")
    message = error_of(archives)
    assert f"sort the images into class folders, or put {VAL} with {DEVKIT} into {archives} and remove" in message
    assert "anew" not in message
    (archives / "elsewhere.tar").rename(archives / VAL)
    shutil.rmtree(archives / "val")
    check(imagenet_data(archives))


def test_classes_that_are_not_extracted(archives):
    (archives / "train").mkdir()
    with tarfile.open(archives / TRAIN) as tar:
        tar.extractall(archives / "train", filter="data")
    (archives / "train" / "n01").mkdir()
    assert f"n01.tar is in no class folder: remove {archives / 'train'}" in error_of(archives)


def test_typical_wrong_roots(image_root, tmp_path):
    assert error_of(image_root / "train").endswith(f"did you mean {str(image_root)!r}?")
    (tmp_path / "outer").mkdir()
    for name in ("train", "val"):
        (tmp_path / name).rename(tmp_path / "outer" / name)
    assert error_of(tmp_path).endswith(f"did you mean {str(tmp_path / 'outer')!r}?")
    assert "does not exist" in error_of(tmp_path / "absent")

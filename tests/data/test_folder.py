import functools
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from trees import refusal, set_up

from matchdistill.data.folder import FolderDataset, find_images, image_transform

folder_data = functools.partial(set_up, "folder", image_size=16, batch_size=4)
error_of = functools.partial(refusal, "folder")


def test_everything_is_found_and_nothing_else(image_root):
    data = folder_data(image_root)
    assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)
    assert (len(data.train_set), len(data.val_set)) == (12, 6)
    names = [Path(path).relative_to(image_root / "train" / "cat") for path in data.train_set.files.paths[:6]]
    assert [str(name) for name in names] == ["1.PNG", "2.webp", "3.bmp", "4.jpeg", "5.png", "nested/deeply/0.jpg"]
    assert data.train_set.files.labels.tolist() == [0] * 6 + [1] * 6
    images, labels = next(iter(data.val_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((3, 3, 16, 16), torch.float32, torch.int64)
    assert type(images) is torch.Tensor


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_for_val(image_root, name):
    (image_root / "val").rename(image_root / name)
    assert len(folder_data(image_root).val_set) == 6


def test_validation_transform():
    image = Image.new("RGB", (448, 224), (255, 0, 51))
    tensor = image_transform(112, augment=False)(image)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(tensor, torch.tensor(expected)[:, None, None].expand(3, 112, 112))


def test_middle_is_kept_in_validation_and_training_varies():
    image = Image.new("RGB", (256, 256))
    image.paste((255, 255, 255), (16, 16, 240, 240))
    still, varied = image_transform(224, augment=False), image_transform(224, augment=True)
    assert still(image).unique().numel() == 3
    torch.manual_seed(0)
    first, second = varied(image), varied(image)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, varied(image))


def test_missing_folders(image_root, tmp_path):
    assert "does not exist" in error_of(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(tmp_path / "file")
    shutil.rmtree(image_root / "train")
    assert error_of(image_root) == f"{image_root} has no folder train"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_as_root(image_root, split, monkeypatch):
    said = f"has no folder train; did you mean {str(image_root)!r}?"
    assert error_of(image_root / split) == f"{image_root / split} {said}"
    monkeypatch.chdir(image_root / split)
    assert error_of(Path()) == f". {said}"


def test_the_folder_around_as_root(image_root, tmp_path):
    inner = tmp_path / "birds" / "birds"
    inner.mkdir(parents=True)
    for name in ("train", "val"):
        (image_root / name).rename(inner / name)
    assert error_of(tmp_path / "birds").endswith(f"did you mean {str(inner)!r}?")


def test_no_class_folders(image_root):
    shutil.rmtree(image_root / "train" / "cat")
    shutil.rmtree(image_root / "train" / "dog")
    (image_root / "train" / "cat.jpg").write_text("")
    assert "has no class folders" in error_of(image_root)


def test_class_folder_without_images(image_root):
    shutil.rmtree(image_root / "train" / "dog")
    (image_root / "train" / "dog").mkdir()
    (image_root / "train" / "dog" / "readme.txt").write_text("")
    assert f"class folder {image_root / 'train' / 'dog'} has no images" in error_of(image_root)


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_class_may_lack_validation_images(image_root, folder):
    shutil.rmtree(image_root / "val" / "cat")
    if folder == "empty":
        (image_root / "val" / "cat").mkdir()
    with pytest.warns(UserWarning, match=r"has no images of 1 of 2 classes \(cat\): these classes are not measured"):
        data = folder_data(image_root)
    assert data.class_names == ["cat", "dog"]
    assert [label for _, labels in data.val_dataloader() for label in labels.tolist()] == [1, 1, 1]
    shutil.rmtree(image_root / "val" / "dog")
    (image_root / "val" / "dog").mkdir()
    assert "has no images" in error_of(image_root)


def test_other_classes_in_validation(image_root):
    (image_root / "val" / "dog").rename(image_root / "val" / "wolf")
    message = error_of(image_root)
    assert f"only in {image_root / 'train'}: dog; only in {image_root / 'val'}: wolf" in message
    for number in range(12):
        (image_root / "train" / f"insect{number:02}").mkdir()
    assert "only in " + str(image_root / "train") + ": dog, insect00, " in error_of(image_root)
    assert "insect08 and 3 more; only in" in error_of(image_root)


@pytest.mark.parametrize("call", ["listdir", "scandir"])
def test_unreadable_folder(image_root, monkeypatch, call):
    function = getattr(os, call)

    def refuse(path):
        if Path(path).name in ("train", "nested"):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path)

    monkeypatch.setattr(os, call, refuse)
    assert "cannot be read (PermissionError" in error_of(image_root)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_with_its_name(image_root, corrupt_paths, workers):
    data = folder_data(image_root, workers=workers)
    with pytest.raises(ValueError, match=r"--data.skip_corrupt=true") as info:
        list(data.train_dataloader())
    assert any(path in str(info.value) for path in corrupt_paths)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_counted_and_warned_about_once(
    image_root, corrupt_paths, workers, monkeypatch, capfd
):
    # pytest records warnings, which would stay in the worker processes.
    monkeypatch.setattr("warnings.warn", lambda message, **_: print(message, file=sys.stderr, flush=True))
    data = folder_data(image_root, skip_corrupt=True, workers=workers)
    assert data.corrupt == []
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert sum(len(labels) for _, labels in batches) == 9
        assert all(len(images) == len(labels) for images, labels in batches)
    assert data.corrupt == corrupt_paths
    said = capfd.readouterr().err
    assert [
        len(re.findall(rf"image {path} (?:cannot be read|is not an image that Pillow can read)", said))
        for path in corrupt_paths
    ] == [1, 1, 1]


def test_batch_of_corrupt_images_is_filled_up(image_root, corrupt_paths):
    files, _, _ = find_images(image_root)
    bad = [files.paths.index(path) for path in corrupt_paths]
    dataset = FolderDataset(files, image_transform(8, False), skip_corrupt=True, fewest=2)
    with pytest.warns(UserWarning, match="is skipped"):
        _, labels = dataset.__getitems__(bad)
    following = [(bad[-1] + step) % 12 for step in range(1, 12)]
    expected = [index for index in following if index not in bad][:2]
    assert labels.tolist() == [int(files.labels[index]) for index in expected]
    dataset.fewest = 1
    assert len(dataset.__getitems__(bad)[1]) == 1
    assert len(dataset.__getitems__([bad[0]])[1]) == 1
    assert dataset[bad[0]] is None


def test_only_corrupt_images(image_root):
    for path in (image_root / "val").rglob("*.*"):
        path.write_bytes(b"")
    data = folder_data(image_root, skip_corrupt=True)
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(ValueError, match="none of the 6 images"):
        next(iter(data.val_dataloader()))
    assert len(data.corrupt) == 6

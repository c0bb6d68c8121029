import functools
import shutil
import tarfile
from pathlib import Path

import pytest
from trees import CUB_CLASSES, CUB_SIZES, add_file, refusal, set_up, write_cub, write_cub_archive

from matchdistill.data import ImageData
from matchdistill.data.cub import read_cub

AGAIN = "extract CUB_200_2011.tgz again"


@pytest.fixture
def small(monkeypatch):
    """Let the data set have the size of the miniature."""
    monkeypatch.setattr("matchdistill.data.cub.CUB_SIZES", CUB_SIZES)


@pytest.fixture
def cub(tmp_path, small):
    """The folder that holds CUB_200_2011."""
    write_cub(tmp_path / "CUB_200_2011")
    return tmp_path


cub_data = functools.partial(set_up, "cub200", image_size=8, batch_size=6)
error_of = functools.partial(refusal, "cub200")


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_lists_are_joined_by_id(tmp_path, small):
    images = write_cub(tmp_path)
    data = cub_data(tmp_path)
    assert (data.class_names, data.num_classes) == (CUB_CLASSES, 3)
    for dataset, training in ((data.train_set, True), (data.val_set, False)):
        found = {
            str(Path(path).relative_to(tmp_path / "images")): label
            for path, label in zip(dataset.files.paths, dataset.files.labels.tolist(), strict=True)
        }
        assert found == {name: label for name, (label, train) in images.items() if train == training}
    batch, labels = next(iter(data.train_dataloader()))
    assert (batch.shape, labels.shape) == ((6, 3, 8, 8), (6,))
    assert ImageData("cub200", tmp_path).image_size == 224


@pytest.mark.parametrize("inside", [".", "CUB_200_2011", "CUB_200_2011/CUB_200_2011"])
def test_the_folder_and_those_that_hold_it(tmp_path, small, inside):
    write_cub(tmp_path / inside)
    assert len(cub_data(tmp_path).train_set) == 12


def test_part_and_limit(cub):
    data = cub_data(cub, train_part=[0, 9], train_limit=6, val_limit=3)
    assert data.train_set.files.labels.bincount().tolist() == [2, 2, 2]
    assert data.val_set.files.labels.bincount().tolist() == [1, 1, 1]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("prepare", [False, True])
def test_archive_is_extracted_once(tmp_path, small, named, prepare, capfd):
    archive = write_cub_archive(tmp_path)
    root = archive if named else tmp_path
    if prepare:
        ImageData("cub200", root).prepare_data()
    data = cub_data(root)
    assert len(data.train_set) == 12
    assert "extracting" in capfd.readouterr().err
    assert Path(data.train_set.files.paths[0]).is_relative_to(tmp_path / "CUB_200_2011" / "images")
    assert not (tmp_path / ".CUB_200_2011.partial").exists()
    archive.write_bytes(b"not looked at again")
    assert len(cub_data(root).train_set) == 12
    assert "extracting" not in capfd.readouterr().err


def test_killed_extraction_leaves_nothing_and_is_done_anew(tmp_path, small, monkeypatch):
    write_cub_archive(tmp_path)
    extract = tarfile.TarFile.extractall

    def killed(tar, path, **options):
        assert options == {"filter": "data"}
        extract(tar, path, **options)
        shutil.rmtree(path / "CUB_200_2011" / "images")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            cub_data(tmp_path)
    assert not (tmp_path / "CUB_200_2011").exists()
    assert not (tmp_path / ".CUB_200_2011.partial").exists()
    # A process that is killed outright cannot clean up.
    (tmp_path / ".CUB_200_2011.partial" / "CUB_200_2011" / "images").mkdir(parents=True)
    assert len(cub_data(tmp_path).train_set) == 12


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.98])
def test_damaged_archive(tmp_path, small, keep):
    archive = write_cub_archive(tmp_path)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    message = error_of(tmp_path)
    assert message.startswith(f"{archive} cannot be extracted")
    assert "get the archive again" in message
    assert not (tmp_path / "CUB_200_2011").exists()
    assert "cannot be extracted" in error_of(tmp_path)


def test_archive_with_other_content(tmp_path):
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as tar:
        add_file(tar, "birds/images.txt", b"")
    assert f"{tmp_path / 'CUB_200_2011.tgz'} holds no folder CUB_200_2011" in error_of(tmp_path)
    assert not (tmp_path / "CUB_200_2011").exists()
    assert not (tmp_path / ".CUB_200_2011.partial").exists()


def test_archive_cannot_write_elsewhere(tmp_path):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "CUB_200_2011.tgz", "w:gz") as tar:
        add_file(tar, "../../escaped", b"")
        add_file(tar, "CUB_200_2011/images.txt", b"")
    assert "OutsideDestinationError" in error_of(tmp_path / "data")
    assert not (tmp_path / "escaped").exists()


def test_nothing_there(tmp_path):
    message = error_of(tmp_path)
    assert f"{tmp_path} has neither images.txt nor a folder CUB_200_2011 with it nor CUB_200_2011.tgz" in message
    assert "did you mean" not in message
    assert "has neither images.txt" in error_of(tmp_path / "absent")


def test_folder_that_is_not_extracted_as_root(tmp_path):
    archive = write_cub_archive(tmp_path)
    assert error_of(tmp_path / "CUB_200_2011").endswith(f"did you mean {str(archive)!r}?")


def test_images_folder_as_root(cub):
    message = error_of(cub / "CUB_200_2011" / "images")
    assert message.endswith(f"did you mean {str(cub / 'CUB_200_2011')!r}?")


@pytest.mark.parametrize("name", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"])
def test_missing_list(cub, name):
    path = cub / "CUB_200_2011" / name
    path.unlink()
    assert error_of(cub).startswith(f"{path} cannot be read (FileNotFoundError")
    path.write_bytes(b"1 \xff\n")
    assert AGAIN in error_of(cub)


@pytest.mark.parametrize("line", ["1001", "one 1", "1001 ", "-1 1", "", "{first}"])
@pytest.mark.parametrize("name", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"])
def test_malformed_line(cub, name, line):
    path = cub / "CUB_200_2011" / name
    lines = path.read_text().splitlines()
    line = line.format(first=lines[0])
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    message = error_of(cub)
    assert message.startswith(f"{path}, line 3 is {line!r}: expected ID VALUE, each ID once")
    assert AGAIN in message


@pytest.mark.parametrize("name", ["images.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_image_in_one_list_only(cub, name):
    path = cub / "CUB_200_2011" / name
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join(others))
    assert f"image {first.split()[0]} is only in one of images.txt and" in error_of(cub)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("image_class_labels.txt", " 1\n", " 4\n"),
        ("image_class_labels.txt", " 1\n", " 2\n"),
        ("image_class_labels.txt", " 1\n", " first\n"),
        ("train_test_split.txt", " 1\n", " 2\n"),
        ("classes.txt", "001.", "201."),
    ],
)
def test_values_that_do_not_fit(cub, name, old, new):
    change(cub / "CUB_200_2011" / name, old, new)
    message = error_of(cub)
    assert "does not fit classes.txt and flags of 0 and 1" in message
    assert AGAIN in message


def test_official_sizes_are_checked(tmp_path):
    write_cub(tmp_path)
    assert (
        "has 12 training images, 6 test images and 3 classes, but the data set 5994, 5794 and 200: remove"
        in error_of(tmp_path)
    )


@pytest.mark.parametrize(
    ("sizes", "change_of"),
    [
        ((11, 7, 3), ("train_test_split.txt", " 1\n", " 0\n")),
        ((12, 6, 4), ("classes.txt", "3 003.", "4 004.Ani\n3 003.")),
    ],
)
def test_wrong_split(cub, monkeypatch, sizes, change_of):
    name, old, new = change_of
    change(cub / "CUB_200_2011" / name, old, new)
    assert "has {} training images, {} test images and {} classes".format(*sizes) in error_of(cub)
    monkeypatch.setattr("matchdistill.data.cub.CUB_SIZES", sizes)
    train, test, classes = read_cub(cub / "CUB_200_2011")
    assert (len(train.paths), len(test.paths), len(classes)) == sizes


def test_missing_images(cub):
    images = cub / "CUB_200_2011" / "images"
    lost = sorted((images / CUB_CLASSES[1]).iterdir())[0]
    lost.unlink()
    assert f"1 of the 18 images are missing, {lost} for one" in error_of(cub)
    shutil.rmtree(images / CUB_CLASSES[0])
    assert "7 of the 18 images are missing" in error_of(cub)
    shutil.rmtree(images)
    assert "18 of the 18 images are missing" in error_of(cub)
    assert AGAIN in error_of(cub)

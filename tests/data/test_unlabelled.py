import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from matchdistill.data import ImageData, UnlabelledData
from matchdistill.data.unlabelled import find_tree


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (10 * number, 80, 80)).save(root / name)
    return root


def found(root):
    """Names of training images, of validation images, and the classes."""
    train, val, class_names = find_tree(root)
    names = [
        None if images is None else [str(Path(path).relative_to(root)) for path in images.paths]
        for images in (train, val)
    ]
    return (*names, class_names)


def set_up(root, **options):
    data = UnlabelledData("folder", root, **{"image_size": 16, "batch_size": 4, **options})
    data.setup()
    return data


FLAT = [f"{number}.png" for number in range(6)]


@pytest.mark.parametrize("seed", range(5))
def test_any_tree(tmp_path, seed):
    chance = random.Random(seed)
    names = sorted({"/".join(chance.choices(["a", "b", "train2", "vals"], k=chance.randrange(4))) for _ in range(6)})
    names = sorted(f"{name}/{number}.jpg".lstrip("/") for number, name in enumerate(names))
    assert found(write(tmp_path, *names)) == (names, None, [])


def test_folders_train_and_val_are_used_as_such(tmp_path):
    write(tmp_path, "train/b/0.png", "train/1.png", "val/x/y/2.png", "test/3.png", "4.png")
    assert found(tmp_path) == (["train/1.png", "train/b/0.png"], ["val/x/y/2.png"], [])
    (tmp_path / "val").rename(tmp_path / "valid")
    assert found(tmp_path)[1] == ["valid/x/y/2.png"]


def test_val_alone_is_held_out(tmp_path):
    write(tmp_path, "val/0.png", "a/1.png", "validity/2.png")
    assert found(tmp_path) == (["a/1.png", "validity/2.png"], ["val/0.png"], [])


def test_train_alone(tmp_path):
    write(tmp_path, "train/a/0.png", "train/b/1.png", "other/2.png")
    assert found(tmp_path) == (["train/a/0.png", "train/b/1.png"], None, [])


def test_class_folders_in_both_are_labels(image_root):
    data, labelled = set_up(image_root), ImageData("folder", image_root, image_size=16, batch_size=4)
    labelled.setup()
    assert data.labelled
    assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)
    for mine, theirs in zip(data.val_dataloader(), labelled.val_dataloader(), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_beside_the_folders_makes_them_no_classes(image_root, split):
    write(image_root, f"{split}/loose.png")
    data = set_up(image_root)
    assert not data.labelled
    assert (len(data.train_set), len(data.val_set)) == ((13, 6) if split == "train" else (12, 7))


def test_one_folder_or_an_empty_one_is_no_class(tmp_path):
    write(tmp_path, *(f"train/images/{name}" for name in FLAT), "val/images/0.png")
    assert found(tmp_path)[2] == []
    shutil.rmtree(tmp_path / "val" / "images")
    with pytest.raises(ValueError, match="val has no images"):
        find_tree(tmp_path)


def test_folders_that_differ_are_no_classes(image_root):
    (image_root / "val" / "dog").rename(image_root / "val" / "wolf")
    with pytest.warns(UserWarning, match=r"are taken for no classes, as some are only in the latter \(wolf\)"):
        data = set_up(image_root)
    assert not data.labelled


def test_a_share_is_held_out_and_always_the_same(tmp_path):
    write(tmp_path, *(f"{number}.png" for number in range(20)))
    with pytest.warns(UserWarning, match="5 of its 20 training images are taken out for validation") as warned:
        first, second = (set_up(tmp_path, val_share=0.25, seed=seed) for seed in (0, 1))
    assert "each class" not in str(warned[0].message)
    assert (len(first.train_set), len(first.val_set)) == (15, 5)
    assert first.val_set.paths == second.val_set.paths
    assert not set(first.val_set.paths) & set(first.train_set.paths)
    assert (first.class_names, first.num_classes) == ([], 0)
    assert all(not labels.any() for _, labels in first.train_dataloader())


def test_the_bank_is_prepared_as_validation_images_are(image_root):
    data = set_up(image_root, bank_limit=8)
    assert data.bank_set.files.labels.bincount().tolist() == [4, 4]
    images, _ = data.bank_set.__getitems__(range(8))
    again, _ = data.bank_set.__getitems__(range(8))
    assert torch.equal(images, again)  # not varied, as training images are
    varied = [data.train_set.__getitems__([0])[0] for _ in range(2)]
    assert not torch.equal(*varied)
    assert len(set_up(image_root).bank_set) == len(set_up(image_root, bank_limit=None).bank_set) == 12


def test_ranks_share_the_bank(image_root, process):
    data = set_up(image_root)
    seen = []
    for rank in range(3):
        process(rank, 3)
        seen += [label for _, labels in data.bank_dataloader() for label in labels.tolist()]
    assert sorted(seen) == [0] * 6 + [1] * 6


def test_a_set_with_labels_serves_to_measure():
    data = UnlabelledData("digits", train_limit=100, bank_limit=20)
    data.setup()
    assert data.labelled
    assert data.bank_set.data.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "has no images (.apng"),
        (["0.png"], "no image can be split off for validation, as there is only one: give validation images"),
        (["val/0.png"], "has no images (.apng"),
    ],
)
def test_too_few_images(tmp_path, names, said):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=re.escape(said)):
        set_up(tmp_path)


def test_roots_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    for name, said in (("absent", "does not exist"), ("file", "is a file")):
        with pytest.raises(ValueError, match=said):
            set_up(tmp_path / name)
    with pytest.raises(ValueError, match=r"data.name is 'folder': give the folder with the images as data.root"):
        UnlabelledData("folder")
    with pytest.raises(ValueError, match=r"data.bank_limit is 0"):
        UnlabelledData(bank_limit=0)

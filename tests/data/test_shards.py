import io
import re
import tarfile

import pytest
import torch
from PIL import Image
from trees import add_file, refusal, set_up

from matchdistill.data.shards import Member


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path, *files, mode="w"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            add_file(archive, name, content.encode() if isinstance(content, str) else content)
    return path


def images(*labels, first=0):
    return [
        file
        for number, label in enumerate(labels, first)
        for file in ((f"{number:03}.png", png(20 * number)), (f"{number:03}.cls", label))
    ]


@pytest.fixture
def root(tmp_path):
    """Two shards of training images, one of validation images, and one that is of neither."""
    root = tmp_path / "shards"
    shard(root / "train-00.tar", *images("1", "0"), ("000.json", "{}"), ("notes", ""), (".hidden.png", ""))
    shard(root / "train-01.tar", *images("0\n", "1", first=2))
    shard(root / "val-00.tar", *images("0", "1"))
    shard(root / "test-00.tar", *images("5"))
    return root


def check(data):
    images, labels = data.train_set.__getitems__([0, 1, 2, 3])
    assert ((images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255).round().tolist() == [20, 40, 0, 60]
    assert labels.tolist() == [0, 0, 1, 1]
    assert data.val_set.files.labels.tolist() == [0, 1]
    assert data.class_names == ["0", "1"]


def test_shards_of_a_folder(root):
    check(set_up("webdataset", root, image_size=16, augment=False))


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{00..01}.tar", "train-0?.tar", "t*-{00..01}.tar"])
def test_shards_by_patterns(root, pattern):
    (root / "test-00.tar").unlink()
    check(set_up("webdataset", root / pattern, val_root=root / "val-00.tar", image_size=16, augment=False))


def test_a_folder_each(root):
    for split in ("train", "val"):
        (root.parent / split).mkdir()
        for path in root.glob(f"{split}*"):
            path.rename(root.parent / split / path.name)
    check(set_up("webdataset", root.parent / "train", val_root=root.parent / "val", image_size=16, augment=False))


def test_without_validation_shards(root):
    with pytest.warns(UserWarning, match=r"train-\*.tar has no validation images: 2 of its 4 training images"):
        data = set_up("webdataset", root / "train-*.tar")
    assert data.val_set.files.labels.tolist() == [0, 1]


def test_names_of_classes_and_of_folders(root):
    for path in root.iterdir():
        path.unlink()
    shard(root / "train.tar", ("b/x.y/1.JPG", png(1)), ("b/x.y/1.cls", "wren"), ("a/1.png", png(2)), ("a/1.cls", "owl"))
    shard(root / "valid.tar", *images("owl", "wren"))
    data = set_up("webdataset", root)
    assert data.class_names == ["owl", "wren"]
    assert [str(place) for place in data.train_set.files.paths] == [
        f"{name} in {root / 'train.tar'}" for name in ("a/1.png", "b/x.y/1.JPG")
    ]


def test_webdataset_reads_the_same(root):
    webdataset = pytest.importorskip("webdataset", reason="its own reader is compared")
    theirs = {
        (sample["__key__"], int(sample["cls"])): sample["png"]
        for path in sorted(root.glob("train*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if "cls" in sample
    }
    files = set_up("webdataset", root).train_set.files
    ours = {
        (place.name.removesuffix(".png"), label): place.open().read()
        for place, label in zip(files.paths, files.labels.tolist(), strict=True)
    }
    assert ours == theirs


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_loaded_by_workers(root, workers):
    data = set_up("webdataset", root, workers=workers, batch_size=2, image_size=16)
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0, 0, 1, 1]


def test_corrupt_images_and_shards(root):
    shard(root / "train-02.tar", ("9.png", b"no image"), ("9.cls", "1"))
    data = set_up("webdataset", root, skip_corrupt=True, image_size=16)
    with pytest.warns(
        UserWarning, match=r"image 9.png in .*train-02.tar is not an image that Pillow can read and is skipped"
    ):
        assert data.train_set[4] is None
    with pytest.raises(ValueError, match=r"train-02.tar is truncated"):
        Member(str(root / "train-02.tar"), "9.png", 10**6, 5).open()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no training images"),
        (images("0")[:1], "shard.tar has no class of 000, but NAME.cls and an image .* belong together; 1 are alone"),
        (images("0")[1:], "shard.tar has no image of 000, but"),
        (images("0") + images("0"), "shard.tar has two images of 000"),
        ([*images("0"), ("000.jpg", png(3))], "shard.tar has two images of 000"),
        ([*images("0"), ("000.cls", "0")], "shard.tar has two classes of 000"),
        (images(""), "000.cls in .*shard.tar is b'': expected the number or name of a class"),
        (images("a\nb"), r"000.cls in .* is b'a\\nb': expected"),
        (images(b"\xff"), r"is b'\\xff': expected"),
        (images("a" * 5000), "000.cls in .* has 5000 bytes: expected"),
    ],
)
def test_what_shards_may_lack(tmp_path, files, message):
    assert re.search(message, refusal("webdataset", shard(tmp_path / "shard.tar", *files)))


def test_bad_places_of_shards(root):
    assert refusal("webdataset", root / "none-*.tar").endswith("none-*.tar")
    assert "there is no shard " in refusal("webdataset", root / "train-{00..02}.tar")
    assert "expected a range {first..last}" in refusal("webdataset", root / "train-{02..00}.tar")
    (root / "empty").mkdir()
    assert refusal("webdataset", root / "empty").endswith("empty has no shards, *.tar")
    with pytest.raises(ValueError, match=r"train-00.tar is a shard of training and of validation images"):
        set_up("webdataset", root / "train*.tar", val_root=root / "train-00.tar")
    for path in root.glob("train*"):
        path.rename(path.with_name(path.name.removeprefix("train-")))
    assert "has no shards train*.tar, but 00.tar, 01.tar, test-00.tar, val-00.tar: give" in refusal("webdataset", root)


def test_damaged_shards(root):
    path = root / "train-00.tar"
    content = path.read_bytes()
    path.write_bytes(content[:700])
    assert f"shard {path} cannot be read (" in refusal("webdataset", root)
    path.write_bytes(b"x" * 5000)
    assert "expected a .tar file that is whole and not compressed" in refusal("webdataset", root)
    shard(path, *images("0"), mode="w:gz")
    assert "expected a .tar file that is whole and not compressed" in refusal("webdataset", root)
    path.unlink()
    path.mkdir()
    assert "is a folder" in refusal("webdataset", root)

from urllib.error import URLError

import pytest
import torch

from matchdistill.data import ImageData
from matchdistill.data import tensors as module
from matchdistill.data.tensors import (
    DEBIAN_FASHION_MNIST,
    GrayImages,
    TensorDataset,
    find_fashion_mnist,
    load_digits,
    load_fashion_mnist,
    read_idx,
)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without the Debian package."""
    monkeypatch.setattr(module, "DEBIAN_FASHION_MNIST", tmp_path / "not-there")


def test_digits_split_is_stratified_and_fixed():
    train, val = load_digits()
    assert (train.images.shape, val.images.shape) == ((1297, 8, 8), (500, 8, 8))
    assert train.images.max() == 255
    counts = val.labels.bincount()
    assert counts.min() >= 48
    assert counts.max() <= 52
    again_train, again_val = load_digits()
    assert torch.equal(train.images, again_train.images)
    assert torch.equal(val.labels, again_val.labels)
    assert not {tuple(image.flatten().tolist()) for image in val.images} & {
        tuple(image.flatten().tolist()) for image in train.images
    }


def test_normalised_like_imagenet():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    batch, labels = TensorDataset(GrayImages(images, torch.tensor([5, 6, 7]))).__getitems__([2, 1])
    assert (batch.shape, batch.dtype, labels.tolist()) == ((2, 3, 4, 4), torch.float32, [7, 6])
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        for row, value in enumerate((1, 0.2)):
            torch.testing.assert_close(batch[row, channel], torch.full((4, 4), (value - mean) / std))


def test_single_item():
    image, label = TensorDataset(GrayImages(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([5, 6])))[1]
    assert (image.shape, label) == ((3, 4, 4), 6)


def test_resize_is_bilinear():
    ramp = (torch.arange(8) * 32).byte().expand(1, 8, 8)
    resized = GrayImages(ramp, torch.zeros(1)).resized(16).images[0, 0].tolist()
    assert resized[:5] == [0, 8, 24, 40, 56]


def shifts_of(shift, flip=False, count=2000):
    """Positions of the bright pixel of the middle of 9 x 9 images after augmentation."""
    images = torch.zeros(count, 9, 9, dtype=torch.uint8)
    images[:, 4, 4] = 255
    images[:, 4, 5] = 128
    torch.manual_seed(0)
    batch, _ = TensorDataset(GrayImages(images, torch.zeros(count)), shift, flip).__getitems__(range(count))
    gray = (batch[:, 0] * 0.229 + 0.485) * 255
    return gray, [divmod(position, 9) for position in gray.flatten(1).argmax(1).tolist()]


def test_shift_reaches_every_offset_and_brings_in_black():
    gray, places = shifts_of(2)
    assert set(places) == {(4 + down, 4 + right) for down in range(-2, 3) for right in range(-2, 3)}
    torch.testing.assert_close(gray.sum((1, 2)), torch.full((2000,), 383.0), atol=0.1, rtol=0)


def test_flip_mirrors_half_of_the_images():
    gray, _ = shifts_of(0, flip=True)
    mirrored = (gray[:, 4, 3] > 100).float().mean()
    assert 0.45 < mirrored < 0.55
    assert torch.equal(gray[:, 4, 3] > 100, gray[:, 4, 5] < 100)


def test_idx_round_trip(tmp_path, write_fashion):
    train, val = load_fashion_mnist(write_fashion(tmp_path))
    assert (train.images.shape, val.images.shape) == ((40, 28, 28), (20, 28, 28))
    assert train.labels.tolist() == list(range(10)) * 4
    assert train.images[3, 0, :2].tolist() == [60, 61]


@pytest.mark.parametrize("damage", ["truncated", "empty", "not gzip", "wrong kind", "too short"])
def test_damaged_idx_file_is_named(tmp_path, write_fashion, damage):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not gzip":
        path.write_bytes(b"hello")
    elif damage == "wrong kind":
        path.write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    else:
        path.write_bytes(module.gzip.compress(module.gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match=path.name) as info:
        read_idx(path, axes=3)
    assert "damaged" in str(info.value)
    assert "\n" not in str(info.value)


def test_images_and_labels_that_do_not_belong_together(tmp_path, write_fashion):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").replace(tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"train-images.* has 40 images but train-labels.* 20 labels"):
        load_fashion_mnist(tmp_path)


def test_places_of_fashion_mnist(tmp_path, nowhere, write_fashion, monkeypatch):
    with pytest.raises(ValueError, match=r"--data.root.*Debian package.*--data.download=true"):
        find_fashion_mnist(None, download=True)
    debian = write_fashion(tmp_path / "debian")
    monkeypatch.setattr(module, "DEBIAN_FASHION_MNIST", debian)
    assert find_fashion_mnist(tmp_path / "own", download=False) == debian
    downloaded = write_fashion(tmp_path / "own" / "FashionMNIST" / "raw")
    assert find_fashion_mnist(tmp_path / "own", download=False) == downloaded
    assert find_fashion_mnist(downloaded, download=False) == downloaded


def test_download(tmp_path, nowhere, write_fashion, monkeypatch):
    calls = []

    def download(root, download):
        calls.append(root)
        if len(calls) == 1:
            raise URLError("no network")
        write_fashion(root / "FashionMNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    data = ImageData("fashion-mnist", root=tmp_path, download=True)
    with pytest.raises(ValueError, match=r"could not be downloaded into .* \(URLError: .*no network"):
        data.prepare_data()
    data.prepare_data()
    data.setup()
    assert len(calls) == 2
    assert len(data.train_set) == 40


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is absent")
def test_fashion_mnist_of_debian():
    data = ImageData("fashion-mnist", train_limit=1000, batch_size=500)
    data.setup()
    assert (len(data.train_set), len(data.val_set)) == (1000, 10_000)
    assert data.class_names[9] == "Ankle boot"
    assert data.train_set.data.labels.bincount().tolist() == [100] * 10
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (500, 3, 32, 32)
    assert labels.dtype == torch.int64

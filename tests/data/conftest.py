import gzip
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture
def image_root(tmp_path):
    """An image folder with every kind of thing in it: 2 classes, 6 images each to train, 3 to validate."""
    suffixes = ["jpg", "PNG", "webp", "bmp", "jpeg", "png"]
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name / "nested" / "deeply"
            folder.mkdir(parents=True)
            for i in range(count):
                place = folder if i == 0 else tmp_path / split / name
                mode = "L" if i == 1 else "RGB"
                noise = torch.randint(60, (30, 40, 3), generator=torch.Generator().manual_seed(i)) + 150 * label
                Image.fromarray(noise.byte().numpy()).convert(mode).save(place / f"{i}.{suffixes[i]}")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


@pytest.fixture
def corrupt_paths(image_root):
    """Damage three training images of ``image_root``, each in another way."""
    truncated, empty, other = (image_root / "train" / name for name in ("cat/4.jpeg", "dog/1.PNG", "dog/3.bmp"))
    truncated.write_bytes(truncated.read_bytes()[:400])
    empty.write_bytes(b"")
    other.write_text("<html>404</html>")
    return sorted(map(str, (truncated, empty, other)))


def write_idx(path, values):
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + shape + values.numpy().tobytes()))


@pytest.fixture
def write_fashion():
    """A function that writes a miniature Fashion-MNIST: 40 training and 20 validation images of 28 px."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for prefix, count in (("train", 40), ("t10k", 20)):
            labels = torch.arange(count) % 10
            images = (labels[:, None, None] * 20 + torch.arange(28)).byte().expand(count, 28, 28)
            write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels.byte())
        return folder

    return write

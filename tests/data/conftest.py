import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def process(monkeypatch):
    """Pretend to be one of several processes."""

    def be(rank, world):
        monkeypatch.setattr("matchdistill.data.module.rank_and_world", lambda: (rank, world))

    return be


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


CATEGORIES = [{"id": 90, "name": "bag"}, {"id": 3, "name": "shoe"}, {"id": 17, "name": "coat"}]  # labels 3, 1, 2


def annotation(number, image, category, box, segmentation, **others):
    left, top, width, height = box
    area = round(width * height * 0.7, 2)
    entries = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
    return {**entries, "segmentation": segmentation or [[left, top, left + width, top, left, top + height]], **others}


@pytest.fixture
def coco_root(tmp_path):
    """A miniature in the layout of COCO 2017: 6 training and 4 validation images, 2 and 1 of them without objects.

    Ids have gaps and no order, images different sizes; masks are polygons of one part and of two, and run lengths.
    """
    (tmp_path / "annotations").mkdir()
    two_parts = [[2, 3, 9.5, 3, 9.5, 8.25], [12, 3, 16, 3.5, 16, 9, 12, 9]]
    for split, ids in (("train2017", [581, 12, 77, 400, 5, 93]), ("val2017", [8, 1000000007, 21, 3])):
        (tmp_path / split).mkdir()
        images, sizes = [], {}
        for place, number in enumerate(ids):
            width, height = sizes[number] = 40 + 3 * place, 30 + place
            name = f"{number:012}.png"
            noise = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        width, height = sizes[ids[3]]
        runs = {"size": [height, width], "counts": [100, 7, height - 7, 9, height * width - 109 - height]}
        notes = [
            annotation(31, ids[3], 90, [3, 2, 2, 8], runs),
            annotation(7, ids[0], 3, [2, 3, 14, 6], two_parts),
            annotation(1000, ids[2], 17, [0.5, 1.25, 20.5, 10], None),
            annotation(8, ids[0], 17, [20, 10, 15.5, 12.25], None),
            annotation(9, ids[3], 3, [4, 4, 10, 20], None),
            annotation(55, ids[3], 17, [0, 0, width, height / 2], runs, iscrowd=1),
        ]
        if split == "train2017":
            notes.append(annotation(2, ids[4], 90, [10, 20, 30, 14.4], None))  # leaves the image by 0.4 px
        content = {"images": images, "annotations": notes, "categories": CATEGORIES}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def edit_coco(coco_root):
    """A function that changes the training annotations of `coco_root` by a function of the JSON."""
    path = coco_root / "annotations" / "instances_train2017.json"

    def edit(change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit

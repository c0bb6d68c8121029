"""Miniatures of data sets in their official layouts, and what reading them comes to."""

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from matchdistill.data import ImageData

CUB_CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
CUB_SIZES = (12, 6, 3)


def set_up(name: str, root: Path, **options: Any) -> ImageData:
    """The data of a root, read."""
    data = ImageData(name, root, **options)
    data.setup()
    return data


def refusal(name: str, root: Path) -> str:
    """The one line that refuses a root."""
    with pytest.raises(ValueError) as info:
        set_up(name, root)
    assert "\n" not in str(info.value)
    return str(info.value)


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 80, 80)).save(file, "JPEG")
    return file.getvalue()


def write_lines(path: Path, lines: list[str], chance: random.Random) -> None:
    chance.shuffle(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_cub(folder: Path) -> dict[str, tuple[int, bool]]:
    """CUB_200_2011 with 3 classes of 4 training and 2 test images: name -> class from 0 on, whether for training.

    The lists are in different orders, and the IDs not without gaps.
    """
    chance = random.Random(0)
    images = {f"{CUB_CLASSES[i % 3]}/Bird_{i:04}_{i * 97}.jpg": (i % 3, i < 12) for i in range(18)}
    ids = dict(zip(images, chance.sample(range(1, 99), 18), strict=True))
    for name in images:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(10))
    write_lines(folder / "images.txt", [f"{ids[name]} {name}" for name in images], chance)
    labels = [f"{ids[name]} {label + 1}" for name, (label, _) in images.items()]
    write_lines(folder / "image_class_labels.txt", labels, chance)
    split = [f"{ids[name]} {int(training)}" for name, (_, training) in images.items()]
    write_lines(folder / "train_test_split.txt", split, chance)
    write_lines(folder / "classes.txt", [f"{i} {name}" for i, name in enumerate(CUB_CLASSES, 1)], chance)
    (folder / "README").write_text("for people")
    return images


def write_cub_archive(folder: Path) -> Path:
    """CUB_200_2011.tgz; like the official one it holds a file beside the folder."""
    write_cub(folder / "source")
    (folder / "attributes.txt").write_text("1 has_bill_shape::curved")
    path = folder / "CUB_200_2011.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "attributes.txt", "attributes.txt")
        tar.add(folder / "source", "CUB_200_2011")
    return path


# Number in the devkit, folder, words, children: the last is no class but holds two of them.
SYNSETS = [(1, "n03", "cat", 0), (2, "n01", "dog", 0), (3, "n02", "cow, ox", 0), (4, "n00", "animal", 2)]
TRUTH = [2, 3, 1, 1, 2, 3]  # classes of the validation images, in the order of their names


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_imagenet_archives(root: Path) -> dict[str, tuple[str, str]]:
    """ImageNet's three archives, of 3 classes with 4 images to train and 2 to validate, and their MD5 sums."""
    names = {
        "train": "ILSVRC2012_img_train.tar",
        "val": "ILSVRC2012_img_val.tar",
        "devkit": "ILSVRC2012_devkit_t12.tar.gz",
    }
    with tarfile.open(root / names["train"], "w") as tar:
        for number, wnid, *_ in SYNSETS[:3]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for i in range(4):
                    add_file(class_tar, f"{wnid}_{i}.JPEG", jpeg(50 * number))
            add_file(tar, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / names["val"], "w") as tar:
        for i in (5, 0, 3, 1, 2, 4):
            add_file(tar, f"ILSVRC2012_val_{i + 1:08}.JPEG", jpeg(50 * TRUTH[i]))
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros(len(SYNSETS), [(field, object) for field in fields])
    for i, (number, wnid, words, children) in enumerate(SYNSETS):
        synsets[i] = (number, wnid, words, "gloss", children, [1, 2][:children], 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(root / names["devkit"], "w:gz") as tar:
        data = "ILSVRC2012_devkit_t12/data"
        add_file(tar, f"{data}/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in TRUTH).encode()
        add_file(tar, f"{data}/ILSVRC2012_validation_ground_truth.txt", truth)
    return {part: (name, hashlib.md5((root / name).read_bytes()).hexdigest()) for part, name in names.items()}

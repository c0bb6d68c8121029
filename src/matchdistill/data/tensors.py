"""Small gray images that are kept in memory: digits and Fashion-MNIST.

Axes: N images, H height, W width. Images are uint8 until a batch is made of them.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from matchdistill.data.augmenting import PLAIN, Variation
from matchdistill.data.loading import Batch
from matchdistill.messages import cause
from matchdistill.models.preparation import IMAGENET, Preparation

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
FASHION_FILES = {  # split: images, labels
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class GrayImages:
    """Images (N, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def subset(self, index: Tensor) -> GrayImages:
        """The images of ``index`` (M,)."""
        return GrayImages(self.images[index], self.labels[index])

    def resized(self, size: int) -> GrayImages:
        """The images at (size, size), bilinearly."""
        if self.images.shape[1:] == (size, size):
            return self
        # In parts: in float, all of Fashion-MNIST would take four times its memory.
        parts = [
            F.interpolate(part[:, None].float(), (size, size), mode="bilinear", antialias=True)[:, 0].round_().byte()
            for part in torch.split(self.images, 4096)
        ]
        return GrayImages(torch.cat(parts), self.labels)


class TensorDataset(Dataset[Any]):
    """Normalised three-channel batches of gray images.

    A batch is fetched, augmented and normalised as one tensor, which is many times faster than image by image.

    Args:
        data: the images, of their final size.
        shift: largest random shift in pixels, 0 for none.
        flip: whether to mirror half of the images at random.
        variation: what is done to them besides.
        preparation: whose mean and deviation they get.
    """

    def __init__(
        self,
        data: GrayImages,
        shift: int = 0,
        flip: bool = False,
        variation: Variation = PLAIN,
        preparation: Preparation = IMAGENET,
    ) -> None:
        self.data = data
        self.shift = shift
        self.flip = flip
        self.variation = variation
        self.mean = torch.tensor(preparation.mean)[:, None, None]
        self.std = torch.tensor(preparation.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image (3, H, W) and its label."""
        images, labels = self.__getitems__([index])
        return images[0], int(labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images (N, 3, H, W) and labels (N,)."""
        batch = self.data.subset(torch.as_tensor(indices, dtype=torch.int64))
        images = _shifted(batch.images, self.shift) if self.shift else batch.images
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        pixels = self.variation.of_pixels(images)
        return self.variation.of_values((pixels.float() / 255 - self.mean) / self.std), batch.labels


def _shifted(images: Tensor, pixels: int) -> Tensor:
    """Each image (N, H, W) moved by up to ``pixels`` in both directions, with black coming in."""
    count, height, width = images.shape
    padded = F.pad(images, [pixels] * 4)
    top, left = torch.randint(2 * pixels + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def load_digits() -> tuple[GrayImages, GrayImages]:
    """scikit-learn's digits (8, 8) as training and validation images; the split, 1297 to 500, is always the same."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().byte()
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(torch.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    everything = GrayImages(images, labels)
    return everything.subset(train), everything.subset(val)


def find_fashion_mnist(root: Path | None, download: bool) -> Path:
    """The folder with the four files, downloaded into ``root`` if that is allowed and they are nowhere."""
    # The second is where torchvision's download puts them.
    places = [*((root, root / "FashionMNIST" / "raw") if root else ()), DEBIAN_FASHION_MNIST]
    names = [name for pair in FASHION_FILES.values() for name in pair]

    def found() -> Path | None:
        return next((place for place in places if all((place / name).is_file() for name in names)), None)

    if found() is None and download and root:
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(root, download=True)
        except Exception as error:  # network, disk or checksum
            raise ValueError(f"fashion-mnist could not be downloaded into {root} ({cause(error)})") from error
    place = found()
    if place is None:
        raise ValueError(
            f"fashion-mnist: no {names[0]} and its three companions in {' or '.join(map(str, places))}: give their "
            "folder as --data.root, install the Debian package dataset-fashion-mnist, or have them downloaded with "
            "--data.root=FOLDER --data.download=true"
        )
    return place


def load_fashion_mnist(folder: Path) -> tuple[GrayImages, GrayImages]:
    """Fashion-MNIST (28, 28) as training and validation images."""
    splits = []
    for images_name, labels_name in FASHION_FILES.values():
        images = read_idx(folder / images_name, axes=3)
        labels = read_idx(folder / labels_name, axes=1).long()
        if len(images) != len(labels):
            raise ValueError(f"{folder / images_name} has {len(images)} images but {labels_name} {len(labels)} labels")
        splits.append(GrayImages(images, labels))
    return splits[0], splits[1]


def read_idx(path: Path, axes: int) -> Tensor:
    """A compressed file of bytes in the idx format: two zeros, type 8, number of axes, their sizes, the values."""
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read, it is damaged or truncated ({cause(error)})") from error
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) != start + math.prod(shape) or not math.prod(shape):
        raise ValueError(f"{path}: expected an idx file of bytes with {axes} axes, the content is damaged or another")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)

"""The data module of images with a class for every pixel.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from matchdistill.data.augmenting import FILL
from matchdistill.data.module import DataModule, DataOptions, path_problems
from matchdistill.data.pictures import Picture, Place, read_picture
from matchdistill.data.pixel_sets import PIXEL_SETS, PixelImages, Wanted
from matchdistill.data.pixels import PADDED, check_masks
from matchdistill.data.reading import FileDataset
from matchdistill.files import path_of
from matchdistill.messages import did_you_mean, number, whole
from matchdistill.models.preparation import IMAGENET, Preparation

LARGEST_SIDE = 16_384
Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N, H, W)


@dataclass
class SegmentationOptions(DataOptions):
    """Images with a class for every pixel, as three channels with the mean and deviation that the network wants.

    `SegmentationData` takes these options and the ones of `DataOptions`.

    Args:
        name: how images and masks lie: ``folder`` for ``ROOT/train/images/*.jpg`` and ``ROOT/train/masks/*.png`` (or
            ``ROOT/images/train`` and ``ROOT/masks/train``; ``val`` likewise), ``voc`` for Pascal VOC, ``cityscapes`` for
            ``leftImg8bit`` and ``gtFine``, ``coco`` for the objects of COCO (``annotations/instances_*.json``) on a
            background, which is class 0, ``coco-panoptic`` for its panoptic PNGs, ``coco-stuff`` for ``stuffthingmaps``.
            Masks are PNGs in gray or with a palette, in which 255 is no class.
        root: the folder of the data set.
        classes: names of the classes, by the values of the masks from 0 on; null: of ``folder`` and ``coco-stuff`` the
            lines of ``ROOT/classes.txt``, of the others their own.
        ignore: further values of the masks that count nowhere, such as [0] for a background that is not to be learned.
        train_split: name of the training part, for example ``trainaug``; null: ``train``, or ``train2017`` of COCO.
        val_split: likewise ``val`` or ``val2017``.
        size: pixels that the shorter side of every image is resized to, before all else; null: images stay as they are.
        crop: [height, width] in pixels of what is cut from training images, and padded where they are smaller.
        scale: [least, most] factor by which training images are resized at random before that.
        flip: mirror half of the training images at random.
        color_jitter: the most by which brightness, contrast and saturation change, as a share; 0: they do not.
        check_masks: read all masks before anything starts, and name those with unknown values or another size than their
            image; false: each is checked when it is used.
    """

    indifferent = DataOptions.indifferent | {"root", "check_masks"}

    name: str = "folder"
    root: Path | None = None
    classes: list[str] | None = None
    ignore: list[int] = field(default_factory=list)
    train_split: str | None = None
    val_split: str | None = None
    size: int | None = None
    crop: list[int] = field(default_factory=lambda: [512, 512])
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: bool = True
    color_jitter: float = 0.0
    check_masks: bool = True
    batch_size: int = field(default=8, kw_only=True)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        if self.name not in PIXEL_SETS:
            yield (
                f"{prefix}.name is {self.name!r}: expected {', '.join(PIXEL_SETS)}{did_you_mean(self.name, PIXEL_SETS)}"
            )
        if self.root is None:
            yield f"give the folder of the data set as {prefix}.root"
        yield from whole(f"{prefix}.size", self.size, 1, LARGEST_SIDE)
        if len(self.crop) != 2:
            yield f"{prefix}.crop is {self.crop}: expected [height, width] in pixels"
        for side in self.crop:
            yield from whole(f"{prefix}.crop", side, 1, LARGEST_SIDE)
        if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 100):
            yield f"{prefix}.scale is {self.scale}: expected two factors [least, most] above 0, for example [0.5, 2]"
        for value in self.ignore:
            yield from whole(f"{prefix}.ignore", value, 0, 255)
        yield from number(f"{prefix}.color_jitter", self.color_jitter, 0, below=1)
        yield from super().problems(prefix)
        yield from path_problems(self.root)


class SegmentationData(DataModule):
    """Images with a class for every pixel.

    Usable without a trainer too: call ``setup()``, which sets the attributes, then ask for loaders. Randomness is a
    function of seed, epoch and rank, and of the number of workers.

    A batch is images (N, 3, H, W), float32 and normalised, and labels (N, H, W) int64: the number of a class, -1 for a
    pixel that counts nowhere, -2 for padding. Training images are all of the size ``crop``; validation images are whole,
    and padded at the bottom and on the right to the largest one of their batch.

    Args:
        positional: the first options of `SegmentationOptions`, in their order.
        options: the others, by name.

    Attributes:
        options: all of them, as `SegmentationOptions`.
        num_classes: number of classes.
        class_names: their names.
        train_set: the training images.
        val_set: the validation images.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.
    """

    options_type = SegmentationOptions
    options: SegmentationOptions
    train_set: PixelDataset
    val_set: PixelDataset

    def _read(self) -> tuple[PixelImages, PixelImages, list[str]]:
        options = self.options
        assert options.root is not None
        root = path_of(options.root)
        if not root.is_dir():
            raise ValueError(f"data.root {root} {'is a file' if root.exists() else 'does not exist'}")
        wanted = Wanted(root, (options.train_split, options.val_split), options.classes, options.ignore)
        train, val, names = PIXEL_SETS[options.name](wanted)
        if (train.masks.labels < 0).all():
            raise ValueError(
                f"data.ignore is {options.ignore}, which leaves no class to learn ({len(names)} classes, {names[0]} to "
                f"{names[-1]}): take the values of some out of it"
            )
        return train, val, names

    def _groups(self, images: PixelImages) -> Tensor:
        return torch.zeros(len(images.paths), dtype=torch.int64)  # all alike: an image shows several classes

    def _dataset(self, images: PixelImages, training: bool) -> PixelDataset:
        if self.options.check_masks:
            check_masks(images.paths, images.masks, "training" if training else "validation")
        return PixelDataset(
            images,
            joint_transform(self.options, training),
            self.options.skip_corrupt,
            self.fewest if training else 1,
            self.read,
            self.preparation,
        )


class RandomScale(v2.Transform):  # type: ignore[misc]  # it has no types
    """Resizes image and mask by one random factor.

    Args:
        least: the smallest factor.
        most: the largest.
    """

    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size of both."""
        factor = self.least + (self.most - self.least) * torch.rand(()).item()
        return {"size": [max(1, round(factor * side)) for side in v2.functional.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image by bilinear interpolation, a mask by its nearest pixels."""
        return v2.functional.resize(inpt, params["size"], antialias=True)


def joint_transform(options: SegmentationOptions, training: bool) -> Callable[..., Any]:
    """What is done to an image (3, H, W) uint8 and its mask (H, W) together, as tv_tensors."""
    steps: list[Any] = [] if options.size is None else [v2.Resize(options.size, antialias=True)]
    if training:
        steps.append(RandomScale(*options.scale))
        filling = {tv_tensors.Image: FILL, tv_tensors.Mask: PADDED}
        steps.append(v2.RandomCrop(options.crop, pad_if_needed=True, fill=filling))
        if options.flip:
            steps.append(v2.RandomHorizontalFlip())
        if jitter := options.color_jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
    transform: Callable[..., Any] = v2.Compose([*steps, v2.Identity()])
    return transform


def normalised(image: Tensor, preparation: Preparation = IMAGENET) -> Tensor:
    """An image (3, H, W) of bytes, in 0..1 and with a network's mean and deviation."""
    scaled: Tensor = v2.functional.normalize(image.float() / 255, list(preparation.mean), list(preparation.std))
    return scaled


class Sample(NamedTuple):
    """An image (3, H, W), and the labels (H, W) of its pixels."""

    image: Tensor
    labels: Tensor


class PixelDataset(FileDataset):
    """Images with the labels of their pixels.

    Args:
        images: the images.
        transform: of an image (3, H, W) uint8 and a mask (H, W) together.
        skip_corrupt: as :class:`FileDataset` has it, for images; a mask that cannot be used is an error.
        fewest: likewise.
        read: what reads a file.
        preparation: whose mean and deviation images get.
    """

    def __init__(
        self,
        images: PixelImages,
        transform: Callable[..., Any],
        skip_corrupt: bool,
        fewest: int = 1,
        read: Callable[[Place], Picture] = read_picture,
        preparation: Preparation = IMAGENET,
    ) -> None:
        super().__init__(images.paths, skip_corrupt, fewest, read)
        self.images, self.transform, self.preparation = images, transform, preparation

    def _sample(self, index: int, picture: Picture) -> Sample:
        labels = self.images.masks.read(index, picture.image.size, picture.orientation)
        image, mask = self.transform(
            tv_tensors.Image(v2.functional.pil_to_tensor(picture.image)),
            tv_tensors.Mask(torch.from_numpy(labels.copy())),
        )
        return Sample(normalised(image.as_subclass(Tensor), self.preparation), mask.as_subclass(Tensor).long())

    def _batch(self, samples: list[Sample]) -> Batch:
        """Images and labels, padded at the bottom and on the right where they are of several sizes."""
        height, width = (max(sample.labels.shape[axis] for sample in samples) for axis in (0, 1))

        def padded(values: Tensor, value: float) -> Tensor:
            return F.pad(values, (0, width - values.shape[-1], 0, height - values.shape[-2]), value=value)

        images = torch.stack([padded(sample.image, 0.0) for sample in samples])
        return images, torch.stack([padded(sample.labels, PADDED) for sample in samples])

"""The data module of contrastive learning: two crops of each image, varied as MoCo-v2 varies them.

X. Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297.

Axes: N images, V crops of an image, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from matchdistill.data.augmenting import Variation
from matchdistill.data.folder import FolderDataset, ImageFiles, image_transform
from matchdistill.data.images import Images
from matchdistill.data.tensors import TensorDataset
from matchdistill.data.unlabelled import UnlabelledData, UnlabelledOptions

CROPS = 2
CROP_SCALE = [0.2, 1.0]


@dataclass
class CropOptions(UnlabelledOptions):
    """Images of which two crops are taken, without labels or with labels that serve to measure alone.

    `CropData` takes these options and the ones of `UnlabelledOptions`.

    Args:
        augment: whether the two crops are varied at all, as MoCo-v2 varies them: cropped, mirrored (but digits), by
            ``color_jitter``, made gray and blurred.
        color_jitter: the most by which brightness, contrast and saturation of four in five crops change, as a share, and
            the hue by a quarter of it; 0: they do not.
        crop_scale: [least, most] share of an image's area that a random crop has; null: [0.2, 1].
    """

    cropped: ClassVar[bool] = True
    color_jitter: float = 0.4

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values, one by one, under the names that they have in a recipe."""
        yield from super().problems(prefix)
        for name, value in (("augmentation", self.augmentation), ("random_erasing", self.random_erasing)):
            if value:
                yield f"{prefix}.{name} does not apply to contrasted crops, which have their own augmentation: leave it out"
        if self.prepared:
            yield f"{prefix}.prepared does not apply to contrasted crops, which are cut from pictures: leave it out"


class CropData(UnlabelledData):
    """Images of which two crops are taken, without labels or with labels that serve to measure alone.

    Training batches are crops (N, 2, 3, H, W) and labels (N,), always whole: the images that are left over in an epoch are
    not seen. A refresh takes training images that are prepared as the validation images are. Validation batches are
    images (N, 3, H, W) and labels (N,); without labels also crops (N, 2, 3, H, W), the same in each validation.

    Args:
        positional: the first options of `CropOptions`, in their order.
        options: the others, by name.

    Raises:
        TypeError: there is no such option; the nearest names are suggested.
        ValueError: in one line, all problems with the options.

    Examples:
        >>> data = CropData(train_limit=300, batch_size=128)
        >>> [crops.shape for crops, labels in data.train_dataloader()]
        [torch.Size([128, 2, 3, 16, 16]), torch.Size([128, 2, 3, 16, 16])]
    """

    options_type = CropOptions
    options: CropOptions

    def _dataset(self, images: Images, training: bool) -> Any:
        if training:
            super()._dataset(images, training=True)  # takes note of the labels, and of the images to measure by
            self._plain_set = super()._dataset(images, training=False)
            return self._crops(images, fewest=self.options.batch_size)
        return super()._dataset(images, training=False) if self.labelled else self._crops(images, held_out=True)

    def _crops(self, images: Images, held_out: bool = False, fewest: int = 1) -> Any:
        """The crops of images, of those held out behind the images themselves."""
        scale = tuple(self.options.crop_scale or CROP_SCALE)
        options, prepared = self.options, self.preparation
        if isinstance(images, ImageFiles):
            kind = HeldOutFiles if held_out else FolderDataset
            plain = image_transform(self.image_size, augment=False, preparation=prepared)
            varied = plain
            if options.augment:
                variation = Variation(scale, tuple(_variations(self.image_size, options.color_jitter)))
                varied = image_transform(self.image_size, True, self._set.flip, variation, prepared)
            several = Several([*([plain] if held_out else []), *[varied] * CROPS])
            return kind(images, several, options.skip_corrupt, fewest, self.read)
        crop = _small_crop(self.image_size, scale, self._set.flip, options.color_jitter) if options.augment else _same
        several = Several([*([_same] if held_out else []), *[crop] * CROPS])
        kind_of_tensors = HeldOutTensors if held_out else TensorDataset
        return kind_of_tensors(
            images.resized(self.image_size), variation=Variation(pixels=(several,)), preparation=prepared
        )

    def check_shares(self, world: int) -> None:
        """Raise a ValueError unless there is a whole batch for each of so many processes."""
        super().check_shares(world)
        if len(self.train_set) < world * self.options.batch_size:
            each = f"{self.options.batch_size} images" + (f" for each of {world} processes" if world > 1 else "")
            raise ValueError(
                f"data.batch_size: a batch of {each} is more than the {len(self.train_set)} training images, and a batch "
                "that is not whole is left out: give a smaller one"
            )

    @property
    def refresh_set(self) -> Any:
        """The training images, prepared as the validation images are."""
        return self._plain_set


class Several:
    """What several transforms make of one picture, stacked (V, 3, H, W)."""

    def __init__(self, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return torch.stack([transform(image) for transform in self.transforms])


class HeldOutFiles(FolderDataset):
    """Images read from files, each as it is and two crops of it."""

    def _batch(self, samples: list[tuple[Tensor, Tensor]]) -> Any:
        return _apart(*super()._batch(samples))


class HeldOutTensors(TensorDataset):
    """Images kept in memory, each as it is and two crops of it."""

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Images (N, 3, H, W), labels (N,) and crops (N, 2, 3, H, W)."""
        return _apart(*super().__getitems__(indices))


def _apart(pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pictures[:, 0], labels, pictures[:, 1:]


def _variations(size: int, jitter: float) -> Iterator[Callable[[Any], Any]]:
    """What MoCo-v2 does to crops besides cropping and mirroring them."""
    from torchvision.transforms import v2

    if jitter:
        yield v2.RandomApply([v2.ColorJitter(jitter, jitter, jitter, min(jitter / 4, 0.5))], p=0.8)
    yield v2.RandomGrayscale(p=0.2)
    # As SimCLR, whose blur it is, about a tenth of the image: at 224 px it ends at the edge of what can be seen.
    kernel = max(3, 2 * (size // 20) + 1)
    yield v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5)


def _small_crop(size: int, scale: tuple[float, ...], flip: bool, jitter: float) -> Callable[[Tensor], Tensor]:
    """Crops of small gray images (3, H, W), varied in the one channel that they have."""
    from torchvision.transforms import v2

    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    varied = v2.Compose([_first, v2.RandomResizedCrop(size, scale), *mirrored, *_variations(size, jitter), _three])
    crop: Callable[[Tensor], Tensor] = varied
    return crop


def _same(image: Tensor) -> Tensor:
    return image


def _first(image: Tensor) -> Tensor:
    return image[:1]


def _three(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)

"""Images that are varied: drawn anew for each, by torch's random numbers, normalised as the others."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from matchdistill.data.augmenting import AugmentingOptions, variation
from matchdistill.data.folder import image_transform
from matchdistill.data.tensors import GrayImages, TensorDataset
from matchdistill.models.preparation import IMAGENET_MEAN, IMAGENET_STD

OPTIONS = [
    *({"augmentation": name} for name in ("randaugment", "autoaugment", "trivialaugment", "three-augment")),
    {"color_jitter": 0.4},
    {"random_erasing": 1.0},
]
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def batch(options, seed=0):
    """Eight times the same image."""
    image = torch.arange(256, dtype=torch.uint8).view(16, 16)
    data = GrayImages(image.expand(8, 16, 16).clone(), torch.arange(8))
    torch.manual_seed(seed)
    return TensorDataset(data, variation=variation(AugmentingOptions(**options))).__getitems__(range(8))[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_image_is_varied_on_its_own_by_torch_alone(options):
    first, again, other = batch(options), batch(options), batch(options, seed=1)
    assert first.shape == (8, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_are_varied_between_the_crop_and_the_normalisation(options):
    """The same transforms, one by one."""
    varied = variation(AugmentingOptions(**options, crop_scale=[0.3, 0.6]))
    image = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    torch.manual_seed(3)
    found = image_transform(16, True, True, varied)(image)
    torch.manual_seed(3)
    expected = v2.RandomHorizontalFlip()(v2.RandomResizedCrop(16, (0.3, 0.6))(image))
    for transform in varied.pixels:
        expected = transform(expected)
    expected = (v2.functional.pil_to_tensor(expected).float() / 255 - MEAN) / STD
    for transform in varied.values:
        expected = transform(expected)
    torch.testing.assert_close(found, expected)


def test_a_stronger_randaugment_changes_more():
    plain = batch({})
    changes = [
        float((batch({"augmentation": "randaugment", "augmentation_strength": strength}) - plain).abs().mean())
        for strength in (1, 30)
    ]
    assert changes[0] < changes[1]


def test_an_erased_rectangle_has_the_mean():
    plain, erased = batch({}), batch({"random_erasing": 1.0})
    changed = erased != plain
    assert changed.flatten(1).any(1).all()
    assert erased[changed].abs().max() == 0


def test_images_are_not_varied_by_default():
    varied = variation(AugmentingOptions())
    assert (varied.pixels, varied.values) == ((), ())

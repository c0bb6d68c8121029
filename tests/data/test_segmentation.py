"""The data module of images with a class for every pixel: what is done to an image is done to its mask."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from matchdistill.data import SegmentationData
from matchdistill.data.pixels import IGNORED, PADDED
from matchdistill.models.preparation import IMAGENET_MEAN, IMAGENET_STD
from pixelsets import write_pixels

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Images whose brightness is their mask: 80 x the class, in blocks, so that interpolation has something to keep."""
    root = tmp_path_factory.mktemp("marked")
    chance = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(12):
            height, width = [(40, 48), (56, 32), (24, 64)][number % 3]
            mask = chance.integers(0, 4, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            Image.fromarray(mask).save(root / split / "masks" / f"{number:02}.png")
            Image.fromarray(np.repeat(mask[:, :, None] * 80, 3, 2)).save(root / split / "images" / f"{number:02}.png")
    return root


def data(root, **options):
    return SegmentationData("folder", root, classes=list("abcd"), **options)


def brightness(images):
    """Of normalised images (N, 3, H, W), in 0..255."""
    return (images * STD + MEAN)[:, 0] * 255


def test_masks_go_with_their_images(marked):
    loaded = data(marked, crop=[36, 44], scale=[0.5, 2.0], batch_size=6)
    sizes = set()
    for epoch in range(2):
        loader = loaded.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            assert images.shape == (6, 3, 36, 44)
            assert labels.dtype == torch.int64
            inside = labels != PADDED
            sizes.add(int(inside.sum()))
            # Nearest and bilinear interpolation differ at the edges of the blocks alone.
            alike = (brightness(images) - 80 * labels).abs() < 1
            assert alike[inside].float().mean() > 0.6
            assert set(labels.unique().tolist()) <= {PADDED, 0, 1, 2, 3}
            filled = brightness(images)[~inside]
            assert ((filled - 124).abs() < 1).all()
    assert len(sizes) > 1


def test_without_scaling_they_are_the_same_pixels(marked):
    loaded = data(marked, crop=[30, 30], scale=[1, 1], batch_size=12)
    images, labels = next(iter(loaded.train_dataloader()))
    inside = labels != PADDED
    assert (~inside).any()  # of the images that are only 24 px high
    assert torch.allclose(brightness(images)[inside], 80.0 * labels[inside], atol=1e-2)


def test_half_of_them_are_mirrored(marked):
    loaded = data(marked, crop=[24, 64], scale=[1, 1], batch_size=12)
    plain = data(marked, crop=[24, 64], scale=[1, 1], flip=False, batch_size=12)
    loaded.setup(), plain.setup()
    wide = [2, 5, 8, 11]  # of exactly that size
    expected = {number: plain.train_set[number].labels for number in wide}
    torch.manual_seed(0)
    seen = [
        (torch.equal(own, expected[number]), torch.equal(own.flip(-1), expected[number]))
        for number in wide * 10
        for own in [loaded.train_set[number].labels]
    ]
    assert all(kept != mirrored for kept, mirrored in seen)
    assert 10 <= sum(mirrored for _, mirrored in seen) <= 30


def test_validation_images_are_whole_and_padded_to_the_largest_one(marked):
    loaded = data(marked, batch_size=3)
    images, labels = next(iter(loaded.val_dataloader()))
    assert images.shape == (3, 3, 56, 64)
    for own, (height, width) in zip(labels, [(40, 48), (56, 32), (24, 64)], strict=True):
        inside = own != PADDED
        assert inside[:height, :width].all()
        assert int(inside.sum()) == height * width
    assert (images.movedim(1, -1)[labels == PADDED] == 0).all()
    half = data(marked, batch_size=3, size=20)
    images, labels = next(iter(half.val_dataloader()))
    assert [int((own != PADDED).sum()) for own in labels] == [20 * 24, 35 * 20, 20 * 53]


def test_batches_are_the_same_again(marked):
    def batches(seed):
        return next(iter(data(marked, crop=[32, 32], batch_size=8, color_jitter=0.4, seed=seed).train_dataloader()))

    first, again, other = batches(3), batches(3), batches(4)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_ignored_values_are_no_class(tmp_path):
    loaded = SegmentationData("folder", write_pixels(tmp_path / "set"), crop=[36, 44], ignore=[0], batch_size=4)
    _, labels = next(iter(loaded.val_dataloader()))
    assert set(labels.unique().tolist()) == {PADDED, IGNORED, 1, 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "vok"}, "data.name is 'vok': expected .*did you mean 'voc'"),
        ({"root": None}, "give the folder of the data set as data.root"),
        ({"crop": [3]}, "data.crop is .3.: expected .height, width."),
        ({"crop": [0, 8]}, "data.crop"),
        ({"scale": [2, 1]}, "data.scale"),
        ({"ignore": [256]}, "data.ignore"),
        ({"size": 0}, "data.size"),
        ({"color_jitter": 2}, "data.color_jitter"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        SegmentationData(**{"name": "folder", "root": "x", **options})


def test_a_value_that_is_no_class_can_be_ignored(tmp_path):
    root = write_pixels(tmp_path / "set")
    path = next((root / "train/masks").iterdir())
    values = np.array(Image.open(path))
    values[:2] = 200
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=r"it has the value 200, which is no class.*or add the value to data.ignore"):
        SegmentationData("folder", root).setup()
    ignoring = SegmentationData("folder", root, ignore=[200])
    ignoring.setup()
    place = [Path(each).stem for each in ignoring.train_set.paths].index(path.stem)
    labels = ignoring.train_set.images.masks.read(place)
    assert (labels[:2] == IGNORED).all()
    assert (labels[2:] != IGNORED).any()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        data(tmp_path / "none").setup()

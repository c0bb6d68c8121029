"""Two crops of each image, varied by the figures of MoCo-v2 (Chen et al., arXiv 2003.04297, and its published code)."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.utils import save_image

from matchdistill.data.crops import CropData, HeldOutFiles
from matchdistill.data.images import ImageData


@pytest.fixture
def tree(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        save_image(torch.rand(3, 40, 30, generator=generator), tmp_path / f"{number:02}.png")
    return tmp_path


def transforms(data):
    """The transforms of the training crops by class, each with what is around it."""
    found = {}

    def walk(transform, around=None):
        found[type(transform).__name__] = (transform, around)
        for child in getattr(transform, "transforms", None) or []:
            walk(child, transform)

    dataset = data.train_set
    several = dataset.transform if hasattr(dataset, "transform") else dataset.variation.pixels[0]
    assert len(several.transforms) == 2
    assert several.transforms[0] is several.transforms[1]
    walk(several.transforms[0])
    return found


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_crops_are_varied_by_the_figures_of_moco_v2(tree, name):
    data = CropData(name=name, root=tree if name == "folder" else None, batch_size=4, image_size=224)
    with pytest.warns(UserWarning, match="no validation") if name == "folder" else torch.no_grad():
        data.setup()
    found = transforms(data)
    crop = found["RandomResizedCrop"][0]
    assert (crop.scale, tuple(crop.ratio), crop.size) == ((0.2, 1.0), (3 / 4, 4 / 3), (224, 224))
    jitter, around = found["ColorJitter"]
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
        *[(0.6, 1.4)] * 3,
        (-0.1, 0.1),
    )
    assert (type(around), around.p) == (v2.RandomApply, 0.8)
    assert found["RandomGrayscale"][0].p == 0.2
    blur, around = found["GaussianBlur"]
    assert (tuple(blur.sigma), tuple(blur.kernel_size), around.p) == ((0.1, 2.0), (23, 23), 0.5)
    assert ("RandomHorizontalFlip" in found) == (name == "folder")  # digits are not mirrored
    order = [each for each in found if each in ("RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur")]
    assert order == ["RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur"]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_different_crops_of_each_image_in_whole_batches(tree, workers):
    data = CropData(name="folder", root=tree, image_size=16, batch_size=8, workers=workers)
    with pytest.warns(UserWarning, match="no validation images"):
        data.setup()
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append([crops for crops, _ in loader])
    assert [crops.shape for crops in epochs[0]] == 2 * [(8, 2, 3, 16, 16)]  # of 18 images 2 are left over
    first, second = torch.cat(epochs[0]).unbind(1)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.01).all()
    assert torch.equal(torch.cat(epochs[0]), torch.cat(epochs[2]))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_a_refresh_takes_images_as_validation_has_them(tree):
    data = CropData(name="folder", root=tree, image_size=16, batch_size=8)
    with pytest.warns(UserWarning, match="no validation images"):
        data.setup()
    plain = ImageData._dataset(data, data.train_set.files, training=False)
    batches = [images for images, _ in data.refresh_dataloader(11, 3)]
    assert [len(images) for images in batches] == [8, 3]
    known = {image.numpy().tobytes() for image, _ in (plain[number] for number in range(len(plain)))}
    taken = [image.numpy().tobytes() for image in torch.cat(batches)]
    assert len(set(taken)) == 11
    assert set(taken) <= known


def test_held_out_crops_are_the_same_in_each_validation(tree):
    data = CropData(name="folder", root=tree, image_size=16, batch_size=8)
    with pytest.warns(UserWarning, match="no validation images"):
        data.setup()
    assert isinstance(data.val_set, HeldOutFiles)
    assert not data.labelled
    (images, labels, crops), (again, _, crops_again) = (next(iter(data.val_dataloader())) for _ in range(2))
    assert (images.shape, labels.shape, crops.shape) == ((2, 3, 16, 16), (2,), (2, 2, 3, 16, 16))
    assert torch.equal(images, again)
    assert torch.equal(crops, crops_again)
    assert not torch.equal(crops[:, 0], crops[:, 1])


def test_labelled_images_are_validated_as_they_are():
    data, plain = (kind(name="digits", val_limit=20) for kind in (CropData, ImageData))
    for each in (data, plain):
        each.setup()
    for own, other in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert all(map(torch.equal, own, other))


def test_images_that_are_not_varied_are_two_times_the_same():
    data = CropData(name="digits", train_limit=20, batch_size=10, augment=False)
    for crops, _ in data.train_dataloader():
        assert torch.equal(crops[:, 0], crops[:, 1])


def test_small_images_can_have_crops_of_another_scale():
    data = CropData(name="digits", train_limit=20, batch_size=10, crop_scale=[0.5, 1.0], color_jitter=0)
    data.setup()
    found = transforms(data)
    assert found["RandomResizedCrop"][0].scale == (0.5, 1.0)
    assert "ColorJitter" not in found


def test_a_batch_is_whole_though_images_are_skipped(tree):
    (tree / "00.png").write_bytes(b"damaged")
    data = CropData(name="folder", root=tree, image_size=16, batch_size=18, skip_corrupt=True, val_share=0.1)
    with pytest.warns(UserWarning, match="is skipped"):
        batches = [crops for crops, _ in data.train_dataloader()]
    assert [len(crops) for crops in batches] == [18]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "randaugment"}, "data.augmentation does not apply to contrasted crops"),
        ({"random_erasing": 0.5}, "data.random_erasing does not apply to contrasted crops"),
        ({"name": "own:function", "prepared": True}, "data.prepared does not apply to contrasted crops"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        CropData(**options)


def test_a_batch_that_is_larger_than_the_images_is_refused():
    data = CropData(name="digits", train_limit=20, batch_size=16)
    data.check_shares(1)
    with pytest.raises(
        ValueError, match="a batch of 16 images for each of 2 processes is more than the 20 training images"
    ):
        data.check_shares(2)

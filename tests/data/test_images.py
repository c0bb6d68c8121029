import pickle
import re

import pytest
import torch

from matchdistill.data import DetectionData, ImageData, LabelsData, UnlabelledData
from matchdistill.data.images import IMAGE_SETS, ImageSet
from matchdistill.data.tensors import GrayImages


def ready(**options):
    data = ImageData(**options)
    data.setup()
    return data


def content(loader, epoch=None):
    """Batches as comparable values; in the process itself, augmentation starts from the global generator."""
    torch.manual_seed(0)
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return [(images.double().sum((1, 2, 3)).tolist(), labels.tolist()) for images, labels in loader]


def test_digits_by_default():
    data = ready()
    assert (data.num_classes, data.class_names) == (10, list("0123456789"))
    assert (len(data.train_set), len(data.val_set)) == (1297, 500)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((64, 3, 16, 16), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)


def test_loaders_need_no_setup_and_setup_happens_once():
    data = ImageData(train_limit=20)
    data.train_dataloader()
    before = data.train_set
    data.setup("fit")
    assert data.train_set is before


def test_image_size_and_augmentation():
    plain = ready(augment=False, image_size=24)
    assert (plain.train_set.shift, plain.train_set.flip) == (0, False)
    assert plain.train_set[0][0].shape == (3, 24, 24)
    assert (ready().train_set.shift, ready().train_set.flip, ready().val_set.shift) == (2, False, 0)


def test_fashion_mnist_in_miniature(tmp_path, write_fashion):
    data = ready(name="fashion-mnist", root=str(write_fashion(tmp_path)), batch_size=8)
    assert (data.train_set.shift, data.train_set.flip, data.val_set.flip) == (4, True, False)
    assert next(iter(data.val_dataloader()))[0].shape == (7, 3, 32, 32)
    assert data.num_classes == len(data.class_names) == 10


def test_limits_are_balanced_and_seeded():
    first, same, other = (ready(train_limit=300, val_limit=50, seed=seed) for seed in (0, 0, 1))
    assert first.train_set.data.labels.bincount().tolist() == [30] * 10
    assert first.val_set.data.labels.bincount().tolist() == [5] * 10
    assert torch.equal(first.train_set.data.images, same.train_set.data.images)
    assert not torch.equal(first.train_set.data.images, other.train_set.data.images)
    assert torch.equal(first.val_set.data.images, other.val_set.data.images)


def test_limits_of_folders(image_root):
    data = ready(name="folder", root=image_root, image_size=8, train_limit=4, val_limit=2)
    assert (data.train_set.files.labels.tolist(), data.val_set.files.labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert (data.train_set.fewest, data.val_set.fewest) == (2, 1)  # images left in a batch with corrupt ones


def pixels(data):
    return {tuple(image.flatten().tolist()) for image in data.train_set.data.images}


def test_parts_of_the_training_images_are_disjoint_balanced_and_the_same_for_every_seed():
    everything = ready(image_size=8)
    parts = [[0, 500], [500, 800], [800, 1297]]
    first, second, third = (ready(image_size=8, train_part=part, seed=seed) for seed, part in enumerate(parts))
    assert first.train_set.data.labels.bincount().tolist() == [50] * 10
    assert second.train_set.data.labels.bincount().tolist() == [30] * 10
    assert [len(data.train_set) for data in (first, second, third)] == [500, 300, 497]
    assert pixels(first) | pixels(second) | pixels(third) == pixels(everything)
    assert len(pixels(first)) + len(pixels(second)) + len(pixels(third)) == len(pixels(everything))
    again = ready(image_size=8, train_part=[0, 500], seed=5)
    assert torch.equal(again.train_set.data.images, first.train_set.data.images)
    assert len(first.val_set) == 500


def test_parts_of_the_validation_images():
    everything = ready(image_size=8).val_set.data.images
    first, second = (ready(image_size=8, val_part=part).val_set.data for part in ([0, 200], [200, 500]))
    assert first.labels.bincount().tolist() == [20] * 10
    rows = {tuple(image.flatten().tolist()) for image in torch.cat([first.images, second.images])}
    assert rows == {tuple(image.flatten().tolist()) for image in everything}
    assert len(first.images) + len(second.images) == len(everything)
    assert len(ready(val_part=[0, 200], val_limit=50).val_set) == 50


def test_limit_chooses_from_the_part():
    part = ready(image_size=8, train_part=[500, 800])
    chosen = [ready(image_size=8, train_part=[500, 800], train_limit=100, seed=seed) for seed in range(2)]
    assert all(pixels(data) < pixels(part) for data in chosen)
    assert chosen[0].train_set.data.labels.bincount().tolist() == [10] * 10
    assert pixels(chosen[0]) != pixels(chosen[1])


def test_part_of_a_folder(image_root):
    data = [ready(name="folder", root=image_root, image_size=8, train_part=part) for part in ([0, 4], [4, 12])]
    assert [each.train_set.files.labels.tolist() for each in data] == [[0, 0, 1, 1], [0] * 4 + [1] * 4]
    assert not set(data[0].train_set.files.paths) & set(data[1].train_set.files.paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": "cifar"}, "expected digits, fashion-mnist, folder"),
        ({"name": "folder"}, "give the folder that holds train/ and val/ as data.root"),
        ({"name": "imagenet"}, "official archives as data.root"),
        ({"name": "cub200"}, "CUB_200_2011, or its archive as data.root"),
        ({"root": "~nobody-has-this-name/x"}, "there is no home of ~nobody-has-this-name"),
        ({"root": "~nobody-has-this-name/x", "workers": -1}, "data.workers is -1: .*; .*there is no home"),
        ({"name": "csv"}, "give the file with columns of paths and labels as data.root"),
        ({"val_root": "~nobody-has-this-name/x"}, "there is no home of ~nobody-has-this-name"),
        ({"val_share": 0}, "data.val_share is 0: expected a number of more than 0 to below 1"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"workers": -1}, "data.workers is -1"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"train_limit": 0}, "data.train_limit is 0"),
        ({"val_limit": -5}, "data.val_limit is -5"),
        ({"train_part": [5]}, r"data.train_part is \[5\]: expected two whole numbers"),
        ({"train_part": [0, 5, 9]}, "expected two whole numbers"),
        ({"train_part": [-1, 5]}, "first from 0 on"),
        ({"train_part": [5, 5]}, "last larger"),
        ({"val_part": [5]}, r"data.val_part is \[5\]: expected two whole numbers"),
        ({"val_part": [0, 501]}, r"data.val_part is \[0, 501\], but there are only 500 images"),
        ({"train_part": [1000, 1298]}, r"data.train_part is \[1000, 1298\], but there are only 1297 images"),
        ({"train_part": [0, 50], "train_limit": 51}, "data.train_limit is 51, but there are only 50 images"),
        ({"train_limit": 1298}, "data.train_limit is 1298, but there are only 1297 images"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message) as info:
        ready(**options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (ImageData, {"batchsize": 3}, "ImageData has no option 'batchsize'; did you mean 'batch_size'"),
        (ImageData, {"masks": True, "seeed": 1}, "no option 'masks'; .*and no option 'seeed'; did you mean 'seed'"),
        (DetectionData, {"image_size": 8}, "DetectionData has no option 'image_size'"),
    ],
)
def test_options_that_there_are_not(module, options, message):
    with pytest.raises(TypeError, match=message):
        module(**options)


def test_all_problems_are_told_under_the_names_in_a_recipe():
    with pytest.raises(ValueError, match=r"^data.image_size is 0: .*; data.batch_size is 0: .*; data.workers is -1: "):
        ImageData(image_size=0, batch_size=0, workers=-1)
    problems = ImageData.options_type("folder", train_part=[3]).problems("teacher.data")
    assert [problem.partition(" is ")[0] for problem in problems] == ["teacher.data.name", "teacher.data.train_part"]


def test_a_data_set_is_added_by_one_function_and_one_line(tmp_path, monkeypatch):
    def stripes(folder):
        rows = torch.arange(12)[:, None, None].expand(12, 6, 6) * 20
        images = GrayImages(rows.byte(), torch.arange(12) % 3)
        return images, images, [f"{folder.name} {number}" for number in range(3)]

    monkeypatch.setitem(IMAGE_SETS, "stripes", ImageSet(10, stripes, "the folder of the stripes", small=True))
    with pytest.raises(ValueError, match=r"data.name is 'stripes': give the folder of the stripes as data.root"):
        ImageData(name="stripes")
    data = ready(name="stripes", root=tmp_path / "red", batch_size=4)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((4, 3, 10, 10), (4,))
    assert data.class_names == ["red 0", "red 1", "red 2"]
    assert (data.train_set.flip, data.val_set.flip) == (True, False)
    assert data.preparation.words(10)["crop_pct"] == 1.0


def test_a_data_module_travels_to_other_processes():
    data = pickle.loads(pickle.dumps(ImageData("cub200", "birds", train_limit=5)))
    assert (data.options.train_limit, data.image_size) == (5, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_repeats_and_epochs_differ(workers):
    options = {"train_limit": 100, "batch_size": 20, "workers": workers}
    loader = ready(**options).train_dataloader()
    zero, one = content(loader, 0), content(loader, 1)
    assert zero != one
    assert content(ready(**options).train_dataloader(), 1) == one
    assert content(ready(seed=1, **options).train_dataloader(), 1) != one


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_epoch_repeats(image_root, workers):
    loaders = [
        ready(name="folder", root=image_root, image_size=8, batch_size=4, workers=workers).train_dataloader()
        for _ in range(2)
    ]
    first = content(loaders[0], 5)
    assert first == content(loaders[1], 5)
    assert first != content(loaders[0], 6)


@pytest.mark.parametrize(("images", "sizes"), [(10, [10]), (64, [64]), (65, [64]), (200, [64, 64, 64])])
def test_no_training_batch_of_one(images, sizes):
    loader = ready(train_limit=images).train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_too_few_training_images(process):
    with pytest.raises(ValueError, match="1 training image for 1 process: each needs at least 2"):
        ready(train_limit=1).train_dataloader()
    process(0, 2)
    with pytest.raises(ValueError, match="2 training images for 2 processes: each needs at least 2"):
        ready(train_limit=2).train_dataloader()


def test_validation_is_complete_in_order_and_without_chance():
    data = ready(batch_size=64)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(labels, data.val_set.data.labels)
    assert torch.rand(1) == expected


def test_ranks_share_training_and_validation(process):
    data = ready(train_limit=100, batch_size=50)
    train, val = [], []
    for rank in range(2):
        process(rank, 2)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        assert loader.sampler.sharded
        train.append(list(loader.sampler))
        batches = list(data.val_dataloader().batch_sampler)
        assert len(batches) == 5
        val.append([index for batch in batches for index in batch])
    assert sorted(train[0] + train[1]) == list(range(100))
    assert sorted(val[0] + val[1]) == list(range(500))


def test_ranks_augment_differently_with_workers(process):
    data = ready(train_limit=2, batch_size=4, workers=1)
    seen = []
    for rank in range(2):
        process(rank, 4)
        loader = data.refresh_dataloader(2, 0)
        seen.append(loader.generator.initial_seed())
    assert seen[0] != seen[1]


def test_refresh_takes_a_random_sample_without_repeats(process):
    data = ready(batch_size=30)
    whole = list(data.refresh_dataloader(100, epoch=2).sampler)
    assert len(set(whole)) == 100
    assert whole == list(ready().refresh_dataloader(100, epoch=2).sampler)
    assert whole != list(data.refresh_dataloader(100, epoch=3).sampler)
    assert whole != list(ready(seed=1).refresh_dataloader(100, epoch=2).sampler)
    assert [len(labels) for _, labels in data.refresh_dataloader(100, epoch=2)] == [30, 30, 30, 10]
    shares = []
    for rank in range(3):
        process(rank, 3)
        loader = data.refresh_dataloader(100, epoch=2)
        assert loader.sampler.sharded
        shares.append(list(loader.sampler))
    assert shares == [whole[rank::3] for rank in range(3)]


def test_refresh_of_everything_and_of_nothing():
    data = ready(train_limit=50)
    assert sorted(data.refresh_dataloader(20_000, 0).sampler) == list(range(50))
    assert content(data.refresh_dataloader(20, 0)) == content(data.refresh_dataloader(20, 0))
    with pytest.raises(ValueError, match="max_images is 0"):
        data.refresh_dataloader(0, 0)


@pytest.mark.parametrize("module", [ImageData, UnlabelledData])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "folder", "val_root": "x"}, "data.val_root is for csv, webdataset, not for 'folder': leave it out"),
        ({"name": "datasets", "val_root": "x"}, "data.val_root is for csv, webdataset, not for 'datasets'"),
        ({"name": "folder", "download": True}, "data.download is for fashion-mnist, not for 'folder'"),
        ({"name": "webdataset", "label_column": "x"}, "data.label_column is for csv, datasets, not for 'webdataset'"),
        ({"name": "imagenet", "image_column": "x"}, "data.image_column is for csv, datasets, not for 'imagenet'"),
        ({"name": "datasets", "split_column": "x"}, "data.split_column is for csv, not for 'datasets'"),
        ({"name": "a.b:c", "train_split": "x"}, "data.train_split is for csv, datasets, not for 'a.b:c'"),
        ({"name": "cub200", "val_split": "x"}, "data.val_split is for csv, datasets, not for 'cub200'"),
        (
            {"name": "csv", "val_root": "x", "split_column": "y"},
            "data.split_column says which images are for validation, but",
        ),
    ],
)
def test_no_set_ignores_an_option(module, options, said):
    root = {} if options["name"] == "digits" else {"root": "there"}
    with pytest.raises(ValueError, match=re.escape(said)):
        module(**root, **options)


def test_no_set_of_several_labels_ignores_a_separator():
    with pytest.raises(ValueError, match=r"data.label_separator is for csv, not for 'datasets': leave it out"):
        LabelsData(name="datasets", root="there", label_separator=";")

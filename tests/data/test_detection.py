import json
import re
import sys

import pytest
import torch

from matchdistill.data import DetectionData
from matchdistill.data import masks as masks_module


def ready(root, **options):
    data = DetectionData(root, **options)
    data.setup()
    return data


def ids(loader):
    """Of the images, in order."""
    return [int(target["image_id"]) for _, targets in loader for target in targets]


def content(loader, epoch=None):
    """Batches as comparable values; in the process itself, flips start from the global generator."""
    torch.manual_seed(0)
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    columns = torch.arange(100.0)
    return [
        [(int(target["image_id"]), (image * columns[: image.shape[2]]).double().sum().item(), target["boxes"].tolist())
         for image, target in zip(images, targets, strict=True)]
        for images, targets in loader
    ]  # fmt: skip


def test_attributes_and_batches(coco_root):
    data = ready(str(coco_root), batch_size=3, masks=True)
    assert (data.num_classes, data.class_names) == (3, ["shoe", "coat", "bag"])
    assert (data.category_ids.tolist(), data.category_ids.dtype) == ([3, 17, 90], torch.int64)
    assert (len(data.train_set), len(data.val_set), data.corrupt) == (6, 4, [])
    images, targets = next(iter(data.train_dataloader()))
    assert isinstance(images, list)
    assert isinstance(targets, list)
    assert len(images) == len(targets) == 3
    for image, target in zip(images, targets, strict=True):
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
    crowds = [target["iscrowd"].tolist() for _, targets in data.val_dataloader() for target in targets]
    assert crowds == [[0, 0], [], [0], [0, 0, 1]]


def test_no_objects_to_measure_by(coco_root):
    path = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    crowds = [note for note in content["annotations"] if note.get("iscrowd")]
    assert crowds
    path.write_text(json.dumps({**content, "annotations": crowds}))
    with pytest.raises(ValueError, match=r"the 4 validation images of .* have no objects"):
        ready(coco_root)


def test_flips_in_training_alone(coco_root):
    data = ready(coco_root, masks=True)
    assert (data.train_set.flip, data.val_set.flip) == (True, False)
    assert ready(coco_root, flip=False).train_set.flip is False
    assert "masks" not in ready(coco_root).train_set[0][1]


def test_other_places(coco_root):
    (coco_root / "train2017").rename(coco_root / "pictures")
    (coco_root / "val2017").rename(coco_root / "pictures" / "val")
    (coco_root / "annotations" / "instances_train2017.json").rename(coco_root / "train.json")
    (coco_root / "annotations" / "instances_val2017.json").rename(coco_root / "val.json")
    data = ready(
        coco_root,
        train_images="pictures",
        val_images="pictures/val",
        train_annotations="train.json",
        val_annotations=str(coco_root / "val.json"),
    )
    assert (len(data.train_set), len(data.val_set)) == (6, 4)


def test_skip_empty(coco_root):
    data = ready(coco_root, skip_empty=True)
    assert data.train_set.images.ids.tolist() == [581, 77, 400, 5]
    assert len(data.val_set) == 4


def test_limits_and_parts(coco_root):
    chosen = [ready(coco_root, train_limit=3, val_limit=2, seed=seed) for seed in (0, 0, 1)]
    train, val = ([getattr(data, name).images.ids.tolist() for data in chosen] for name in ("train_set", "val_set"))
    assert [len(images) for images in train + val] == [3] * 3 + [2] * 3
    assert train[0] == train[1] != train[2]
    assert val[0] == val[1] == val[2]
    first, second = (ready(coco_root, train_part=part, seed=seed) for seed, part in enumerate(([0, 2], [2, 6])))
    assert sorted(first.train_set.images.ids.tolist() + second.train_set.images.ids.tolist()) == [
        5,
        12,
        77,
        93,
        400,
        581,
    ]
    first, second = (ready(coco_root, val_part=part) for part in ([0, 1], [1, 4]))
    assert sorted(first.val_set.images.ids.tolist() + second.val_set.images.ids.tolist()) == [3, 8, 21, 1000000007]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "give the folder that holds annotations/ and the images' folders as data.root"),
        ({"bad_annotations": "ignore"}, "data.bad_annotations is 'ignore': expected refuse or skip"),
        ({"batch_size": 0}, "data.batch_size is 0: expected a whole number from 1 on"),
        ({"workers": -1}, "data.workers is -1"),
        ({"train_limit": 0}, "data.train_limit is 0"),
        ({"val_limit": 0}, "data.val_limit is 0"),
        ({"train_part": [3, 3]}, r"data.train_part is \[3, 3\]"),
        ({"train_limit": 7}, "data.train_limit is 7, but there are only 6 images"),
        ({"skip_empty": True, "train_limit": 5}, "data.train_limit is 5, but there are only 4 images"),
        ({"val_images": "val"}, "val does not exist"),
        ({"root": None, "batch_size": 0}, "as data.root; data.batch_size is 0"),
    ],
)
def test_wrong_arguments(coco_root, options, message):
    with pytest.raises(ValueError, match=message) as info:
        ready(**{"root": coco_root, **options})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("wrong", ["train2017", "."])
def test_root_that_is_a_step_beside(coco_root, wrong):
    root = coco_root / wrong
    if wrong == ".":
        for name in ("annotations", "train2017", "val2017"):
            (coco_root / "coco").mkdir(exist_ok=True)
            (coco_root / name).rename(coco_root / "coco" / name)
    meant = coco_root / "coco" if wrong == "." else coco_root
    with pytest.raises(ValueError, match=re.escape(f"does not exist; did you mean {str(meant)!r} as data.root?")):
        ready(root)


def test_categories_must_be_the_same(coco_root, edit_coco):
    edit_coco(lambda content: content["categories"].append({"id": 5, "name": "hat"}))
    with pytest.raises(ValueError, match="must have the same categories, but 'hat' with id 5 is only in one of them"):
        ready(coco_root)


def test_bad_annotations(coco_root, edit_coco):
    edit_coco(lambda content: content["annotations"][0].update(category_id=4))
    with pytest.raises(ValueError, match=r"annotation 31: .*category_id 4"):
        ready(coco_root)
    with pytest.warns(UserWarning, match="annotation 31"):
        data = ready(coco_root, bad_annotations="skip")
    assert len(data.train_set[3][1]["labels"]) == 1


def test_no_image_with_objects(coco_root, edit_coco):
    edit_coco(lambda content: content["annotations"].clear())
    assert len(ready(coco_root).train_set) == 6
    with pytest.raises(ValueError, match=r"instances_train2017\.json has no image with objects"):
        ready(coco_root, skip_empty=True)


def test_masks_without_a_library(coco_root, monkeypatch):
    monkeypatch.setattr(masks_module, "RASTERISERS", ("not_installed.mask",))
    ready(coco_root)
    with pytest.raises(ValueError, match=r"pip install 'matchdistill\[detection\]'"):
        ready(coco_root, masks=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_repeats_and_epochs_differ(coco_root, workers):
    options = {"batch_size": 3, "workers": workers}
    loader = ready(coco_root, **options).train_dataloader()
    zero, one = content(loader, 0), content(loader, 1)
    assert zero != one
    assert content(ready(coco_root, **options).train_dataloader(), 1) == one
    assert content(ready(coco_root, seed=1, **options).train_dataloader(), 1) != one


def test_incomplete_batches_are_dropped_but_one_image_is_enough(coco_root):
    assert [len(images) for images, _ in ready(coco_root, batch_size=4).train_dataloader()] == [4]
    assert [len(images) for images, _ in ready(coco_root, batch_size=16).train_dataloader()] == [6]
    assert [len(images) for images, _ in ready(coco_root, batch_size=1).train_dataloader()] == [1] * 6
    assert [len(images) for images, _ in ready(coco_root, train_limit=1).train_dataloader()] == [1]


def test_validation_in_order(coco_root):
    loader = ready(coco_root, batch_size=3).val_dataloader()
    assert ids(loader) == [8, 1000000007, 21, 3]
    assert [len(images) for images, _ in loader] == [2, 2]


def test_ranks_share_the_images(coco_root, process):
    data = ready(coco_root, batch_size=2)
    train, val, refresh = [], [], []
    for rank in range(2):
        process(rank, 2)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        train += ids(loader)
        val += ids(data.val_dataloader())
        loader = data.refresh_dataloader(5, 0)
        assert loader.sampler.sharded
        refresh += ids(loader)
    assert sorted(val) == [3, 8, 21, 1000000007]
    assert len(train) == len(set(train)) == 4  # of three a process, the odd one is left for another epoch
    assert len(refresh) == len(set(refresh)) == 5


def test_refresh_is_a_function_of_seed_and_epoch(coco_root):
    data = ready(coco_root, batch_size=2)
    batches = content(data.refresh_dataloader(5, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert content(ready(coco_root, batch_size=2).refresh_dataloader(5, 2)) == batches
    assert content(data.refresh_dataloader(5, 3)) != batches
    assert len({tuple(ids(data.refresh_dataloader(5, epoch))) for epoch in range(4)}) > 1
    assert sorted(ids(data.refresh_dataloader(16_000, 0))) == [5, 12, 77, 93, 400, 581]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images(coco_root, workers, monkeypatch, capfd):
    # pytest records warnings, which would stay in the worker processes.
    monkeypatch.setattr("warnings.warn", lambda message, **_: print(message, file=sys.stderr, flush=True))
    paths = [coco_root / "train2017" / f"{number:012}.png" for number in (5, 12)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^image .* is not an image that Pillow can read: .*--data.skip_corrupt=true$"
    ):
        list(ready(coco_root, batch_size=3, workers=workers).train_dataloader())
    data = ready(coco_root, batch_size=3, workers=workers, skip_corrupt=True)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert sorted(ids(loader)) == [77, 93, 400, 581]
    assert sorted(data.corrupt) == sorted(map(str, paths))
    said = capfd.readouterr().err
    assert [said.count(f"image {path} is not an image") for path in paths] == [1, 1]


def test_setup_happens_once(coco_root):
    data = DetectionData(coco_root)
    data.train_dataloader()
    before = data.train_set
    data.setup("fit")
    assert data.train_set is before


def test_broken_annotations_are_named_before_training(coco_root):
    (coco_root / "annotations" / "instances_val2017.json").write_text(json.dumps({"images": []})[:-1])
    with pytest.raises(ValueError, match=r"instances_val2017\.json is damaged or not JSON"):
        ready(coco_root)

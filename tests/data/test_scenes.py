import json

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

from matchdistill.data import DetectionData
from matchdistill.data import tensors as tensors_module
from matchdistill.data.masks import runs_of
from matchdistill.data.scenes import compose, main, outlines, write_scenes
from matchdistill.data.tensors import DEBIAN_FASHION_MNIST, GrayImages

pycocotools = pytest.importorskip("pycocotools.mask")


def rings():
    """Twenty bright items of ten classes; every other one has a hole."""
    distance = (torch.arange(28) - 13.5).square()
    distance = (distance[:, None] + distance).sqrt()
    inner, outer = torch.arange(20) % 2 * 4, 8 + torch.arange(20) // 4
    images = (distance >= inner[:, None, None]) & (distance < outer[:, None, None])
    return GrayImages(images.byte() * 200, torch.arange(20) // 2)


@pytest.fixture
def fashion(tmp_path, write_fashion, monkeypatch):
    """A folder whose items look different from one another once they are read."""
    monkeypatch.setattr("matchdistill.data.scenes.load_fashion_mnist", lambda folder: (rings(), rings()))
    return write_fashion(tmp_path / "fashion")


@pytest.fixture
def scenes(tmp_path, fashion):
    write_scenes(tmp_path / "scenes", train=24, val=14, size=100, fashion_mnist=fashion)
    return tmp_path / "scenes"


def annotations(scenes, split):
    return json.loads((scenes / "annotations" / f"instances_{split}2017.json").read_text())


def test_files(scenes):
    assert sorted(path.name for path in scenes.iterdir()) == ["README.md", "annotations", "train2017", "val2017"]
    assert [len(list((scenes / split).iterdir())) for split in ("train2017", "val2017")] == [24, 14]
    readme = (scenes / "README.md").read_text()
    for words in ("24 training and 14 validation images of 100 x 100", "--seed 0", "MIT license", "Zalando SE"):
        assert words in readme


def test_scenes_are_read_as_they_are(scenes):
    data = DetectionData(scenes, masks=True, batch_size=4)
    data.setup()
    assert (len(data.train_set), len(data.val_set), data.num_classes) == (24, 14, 10)
    assert data.class_names[9] == "Ankle boot"
    train, val = ([images[i][1] for i in range(len(images))] for images in (data.train_set, data.val_set))
    for targets in (train, val):
        counts = [len(target["labels"]) for target in targets]
        assert [number for number, count in enumerate(counts, 1) if count == 0] == list(range(4, len(targets) + 1, 10))
        assert max(counts) > 2
    crowds = [int(target["iscrowd"].sum()) for target in val]
    assert crowds == [0] * 6 + [1] + [0] * 7
    assert sum(int(target["iscrowd"].sum()) for target in train) == 0
    labels = torch.cat([target["labels"] for target in train])
    assert labels.unique().numel() >= 8


def test_annotations_are_of_the_visible_pixels(scenes):
    from pycocotools.coco import COCO

    for split in ("train", "val"):
        coco = COCO(scenes / "annotations" / f"instances_{split}2017.json")
        kinds = {type(note["segmentation"]) for note in coco.anns.values()}
        assert kinds == {list, dict}
        for image_id in coco.imgs:
            seen = np.zeros((100, 100), int)
            for note in coco.imgToAnns[image_id]:
                mask = coco.annToMask(note)
                rows, columns = mask.nonzero()
                left, top, width, height = note["bbox"]
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
                assert note["area"] == mask.sum() > 0
                seen += mask
            assert seen.max() <= 1  # nothing is seen through


def plain(brightness):
    """Items of ten classes that fill a square of 20 px, of one brightness."""
    images = torch.zeros(10, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 4:24] = brightness
    return GrayImages(images, torch.arange(10))


def test_items_stay_visible_and_are_where_the_masks_say():
    chance = np.random.default_rng(0)
    shares = []
    for _ in range(30):
        pixels, shown = compose(plain(255), 128, chance)
        assert (pixels.shape, pixels.dtype) == ((128, 128, 3), np.uint8)
        for item, mask in shown:
            shares.append(mask.sum() / item.size)
            # One tint, which is the same wherever the item is not blurred by the resizing.
            inner = pixels[ndimage.binary_erosion(mask, iterations=3)]
            assert not len(inner) or np.ptp(np.median(inner, 0) - inner, 0).max() <= 40
    assert 0.3 <= min(shares) < 0.6
    assert max(shares) == 1
    assert len(shares) > 60


def test_what_is_black_is_no_item():
    assert compose(plain(30), 128, np.random.default_rng(0))[1] == []


def test_crowd_is_one_entry_of_many_items():
    for seed in range(5):
        _, shown = compose(plain(255), 128, np.random.default_rng(seed), crowd=True)
        assert [item.crowd for item, _ in shown] == [True] + [False] * (len(shown) - 1)
        assert shown[0][0].size > 3 * 16 * 16 * (20 / 28) ** 2
    assert compose(plain(255), 128, np.random.default_rng(0), empty=True)[1] == []


def test_sizes_of_coco_all_occur(tmp_path, fashion):
    write_scenes(tmp_path / "scenes", train=30, val=1, size=240, fashion_mnist=fashion)
    areas = np.array([note["area"] for note in annotations(tmp_path / "scenes", "train")["annotations"]])
    small, large = areas < 32**2, areas > 96**2
    assert min(small.sum(), large.sum(), (~small & ~large).sum()) > 1


def test_scenes_are_a_function_of_the_seed(tmp_path, fashion):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, 4, 3, 64, seed, fashion)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_and_validation_share_no_items(tmp_path, fashion, monkeypatch, split):
    black = GrayImages(torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10))
    both = (rings(), black) if split == "train" else (black, rings())
    monkeypatch.setattr("matchdistill.data.scenes.load_fashion_mnist", lambda folder: both)
    write_scenes(tmp_path / "scenes", 6, 6, 64, fashion_mnist=fashion)
    for name in ("train", "val"):
        assert bool(annotations(tmp_path / "scenes", name)["annotations"]) == (name == split)


def blobs():
    random = np.random.default_rng(0)
    for _ in range(40):
        mask = ndimage.gaussian_filter(random.random((23, 31)), random.uniform(0, 3)) > 0.5
        yield ndimage.binary_fill_holes(mask)
    yield np.eye(6, dtype=bool)  # pixels that touch at their corners
    yield np.ones((3, 4), bool)


def test_outlines_are_drawn_by_pycocotools_as_the_mask():
    for mask in blobs():
        polygons = outlines(mask)
        drawn = pycocotools.decode(pycocotools.merge(pycocotools.frPyObjects(polygons, *mask.shape)))
        assert np.array_equal(drawn, mask)
        for polygon in polygons:  # each corner turns
            steps = np.diff(np.array([*polygon, *polygon[:4]]).reshape(-1, 2), axis=0)
            assert (steps[:-1] * steps[1:] == 0).all()


def test_runs_are_read_by_pycocotools_as_the_mask():
    random = np.random.default_rng(0)
    masks = [random.random((5, 7)) < share for share in (0, 0.3, 0.7, 1)]
    for mask in [*masks, np.eye(4, dtype=bool)]:
        runs = runs_of(mask)
        assert json.loads(json.dumps(runs)) == runs
        assert np.array_equal(pycocotools.decode(pycocotools.frPyObjects(runs, *mask.shape)), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train is 0: expected a whole number from 1 on"),
        ({"val": -1}, "val is -1"),
        ({"size": 63}, "size is 63: expected a whole number from 64 on"),
    ],
)
def test_wrong_numbers(tmp_path, fashion, options, message):
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "scenes", **{"train": 2, "val": 2, "fashion_mnist": fashion, **options})
    assert not (tmp_path / "scenes").exists()


def test_existing_folder_is_left_alone(tmp_path, fashion):
    (tmp_path / "scenes").mkdir()
    with pytest.raises(ValueError, match="scenes exists already"):
        write_scenes(tmp_path / "scenes", 2, 2, fashion_mnist=fashion)
    assert list((tmp_path / "scenes").iterdir()) == []


def test_nothing_stays_of_scenes_that_fail(tmp_path, fashion, monkeypatch):
    monkeypatch.setattr("matchdistill.data.scenes.README", None)  # the last thing that is written
    with pytest.raises(AttributeError):
        write_scenes(tmp_path / "new" / "scenes", 2, 2, 64, fashion_mnist=fashion)
    assert list((tmp_path / "new").iterdir()) == []


def test_command_line(tmp_path, write_fashion, monkeypatch, capsys):
    fashion = write_fashion(tmp_path / "fashion")
    main([str(tmp_path / "scenes"), "--train", "3", "--val", "2", "--size", "64", "--fashion-mnist", str(fashion)])
    assert len(annotations(tmp_path / "scenes", "train")["images"]) == 3
    monkeypatch.setattr(tensors_module, "DEBIAN_FASHION_MNIST", tmp_path / "not-there")
    with pytest.raises(SystemExit) as info:
        main([str(tmp_path / "others")])
    assert info.value.code == 2
    assert "error: no Fashion-MNIST: install the Debian package" in capsys.readouterr().err


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is absent")
def test_scenes_of_the_real_items(tmp_path):
    write_scenes(tmp_path / "scenes", train=5, val=7)
    data = DetectionData(tmp_path / "scenes", masks=True)
    data.setup()
    assert sum(len(data.val_set[i][1]["labels"]) for i in range(7)) > 7


def enclosed(polygon, size):
    """The pixels (H, W) whose middle an outline encloses: a ray to the left crosses it an odd number of times."""
    points = np.array(polygon).reshape(-1, 2)
    odd = np.zeros((size, size), bool)
    for (left, top), (right, bottom) in zip(points, np.roll(points, -1, 0), strict=True):
        for row in range(size):
            if min(top, bottom) <= row + 0.5 < max(top, bottom):
                crossing = left + (row + 0.5 - top) / (bottom - top) * (right - left)
                odd[row] ^= np.arange(size) + 0.5 > crossing
    return odd


def test_scenes_for_ultralytics(tmp_path, fashion):
    """The training scenes are the ones of COCO's format: the same pixels, and the same masks in the same order."""
    from pycocotools.coco import COCO

    for kind in ("coco", "yolo"):
        main(
            [
                str(tmp_path / kind),
                *"--train 24 --val 14 --size 100 --format".split(),
                kind,
                "--fashion-mnist",
                str(fashion),
            ]
        )
    root = tmp_path / "yolo"
    assert sorted(path.name for path in root.iterdir()) == ["README.md", "data.yaml", "images", "labels"]
    said = yaml.safe_load((root / "data.yaml").read_text())
    assert said["names"][9] == "Ankle boot"
    for split, count in (("train", 24), ("val", 14)):
        names = [f"{number:012}" for number in range(1, count + 1)]
        assert sorted(path.stem for path in (root / said[split]).iterdir()) == names
        assert sorted(path.stem for path in (root / "labels" / split).iterdir()) == names
    assert (root / "labels" / "val" / f"{7:012}.txt").read_text()  # no crowd
    coco = COCO(tmp_path / "coco" / "annotations" / "instances_train2017.json")
    holes = 0
    for number, image in coco.imgs.items():
        name = image["file_name"]
        assert (root / "images" / "train" / name).read_bytes() == (tmp_path / "coco" / "train2017" / name).read_bytes()
        notes = coco.imgToAnns[number]
        lines = (root / "labels" / "train" / name).with_suffix(".txt").read_text().splitlines()
        assert len(lines) == len(notes)
        for line, note in zip(lines, notes, strict=True):
            label, *outline = line.split()
            assert int(label) == note["category_id"] - 1
            polygon = 100 * np.array(outline, float)
            assert np.array_equal(enclosed(polygon, 100), coco.annToMask(note) > 0)
            holes += isinstance(note["segmentation"], dict)
    assert holes > 3
    assert "--format yolo" in (root / "README.md").read_text()


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format is 'voc': expected one of coco, yolo"):
        write_scenes(tmp_path / "scenes", 1, 1, 100, format="voc")

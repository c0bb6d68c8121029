"""Masks, read as each data set stores them, against slow loops."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from matchdistill.data import SegmentationData
from matchdistill.data.pixel_sets import CITYSCAPES, VOC_CLASSES
from matchdistill.data.pixels import IGNORED, PngMasks, check_masks, lookup
from pixelsets import CLASSES, write_pixels


def save(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values, np.uint8), mode)
    if mode == "P":
        picture.putpalette([*range(256)] * 3)
    picture.save(path)


def data(name, root, **options):
    found = SegmentationData(name, root, crop=[8, 8], scale=[1, 1], flip=False, batch_size=2, **options)
    found.setup()
    return found


def labels_of(images, number=0):
    return images.masks.read(number).tolist()


@pytest.mark.parametrize("mode", ["L", "P"])
def test_numbers_are_classes_whether_gray_or_with_a_palette(tmp_path, mode):
    values = np.random.default_rng(0).choice([0, 3, 7, 255], (5, 6))
    save(tmp_path / "mask.png", values, mode)
    masks = PngMasks([str(tmp_path / "mask.png")], lookup({0: 0, 3: 1, 7: 2}, ignore=[]))
    known = {0: 0, 3: 1, 7: 2, 255: IGNORED}
    assert masks.read(0).tolist() == [[known[value] for value in row] for row in values.tolist()]
    ignoring = PngMasks(masks.paths, lookup({0: 0, 3: 1, 7: 2}, ignore=[0]))
    assert (ignoring.read(0) == IGNORED).sum() == np.isin(values, [0, 255]).sum()


def test_voc(tmp_path):
    for number, split in enumerate(["train", "train", "val"]):
        save(tmp_path / f"JPEGImages/{number}.jpg", np.zeros((9, 8, 3)))
        save(tmp_path / f"SegmentationClass/{number}.png", [[0, 20, 255, number] * 2] * 9, "P")
        listing = tmp_path / f"ImageSets/Segmentation/{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text((listing.read_text() if listing.exists() else "") + f"{number}\n")
    found = data("voc", tmp_path)
    assert found.class_names == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert len(found.train_set) == 2
    assert labels_of(found.val_set.images)[0][:4] == [0, 20, IGNORED, 2]
    with pytest.raises(ValueError, match="did you mean"):
        data("voc", tmp_path.parent if (tmp_path.rename(tmp_path.parent / "VOC2012")) else None)


def test_cityscapes(tmp_path):
    """By the ids and train ids of the data set's own table, of which some are written here."""
    trained = {7: 0, 8: 1, 11: 2, 20: 7, 26: 13, 28: 15, 31: 16, 33: 18}
    values = [*trained, 0, 4, 9, 29, 255]
    for split in ("train", "train", "val"):
        save(tmp_path / f"leftImg8bit/{split}/ulm/ulm_0_leftImg8bit.png", np.zeros((2, len(values), 3)))
        save(tmp_path / f"gtFine/{split}/ulm/ulm_0_gtFine_labelIds.png", [values] * 2)
    found = data("cityscapes", tmp_path)
    assert len(CITYSCAPES) == found.num_classes == 19
    assert [found.class_names[number] for number in (0, 13, 18)] == ["road", "car", "bicycle"]
    assert labels_of(found.val_set.images)[1] == [*trained.values(), *[IGNORED] * 5]
    save(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png", [[77] * len(values)] * 2)
    with pytest.raises(ValueError, match=r"has the value 77, which is no class: expected 0 to 33, 255"):
        data("cityscapes", tmp_path)


def test_panoptic_pngs(tmp_path):
    chance = np.random.default_rng(0)
    categories = {1: "person", 44: "bottle", 200: "sky"}
    segments = {70_000: 44, 5: 1, 300: 200, 301: 200}
    drawn = {}
    for split in ("train2017", "val2017"):
        numbers = chance.choice([0, *segments], (6, 7))
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1)
        save(tmp_path / split / "a.jpg", np.zeros((6, 7, 3)))
        save(tmp_path / f"annotations/panoptic_{split}/a.png", colours)
        drawn[split] = numbers
        content = {
            "images": [{"id": 3, "file_name": "a.jpg"}],
            "annotations": [
                {
                    "image_id": 3,
                    "file_name": "a.png",
                    "segments_info": [{"id": each, "category_id": kind} for each, kind in segments.items()],
                }
            ],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
        }
        (tmp_path / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))
    found = data("coco-panoptic", tmp_path)
    assert found.class_names == list(categories.values())
    known = {0: IGNORED, **{each: list(categories).index(kind) for each, kind in segments.items()}}
    assert labels_of(found.val_set.images) == [[known[value] for value in row] for row in drawn["val2017"].tolist()]
    save(tmp_path / "annotations/panoptic_val2017/a.png", np.full((6, 7, 3), 9))
    with pytest.raises(ValueError, match="shows the segment 592137, which the annotations do not have"):
        data("coco-panoptic", tmp_path)


def test_objects_are_drawn_on_a_background(coco):
    found = data("coco", coco)
    assert found.class_names == ["background", "cross", "disc", "bar"]
    images = found.train_set.images
    objects = images.masks.images
    for number, size in enumerate(objects.sizes.tolist()):
        owners = [[set() for _ in range(size[1])] for _ in range(size[0])]
        for row in range(*objects.rows[number].tolist()):
            mask = objects.annotations.mask(row, *size)
            for y, x in mask.nonzero().tolist():
                owners[y][x].add(int(objects.annotations.labels[row]))
        expected = [[IGNORED if len(own) > 1 else max(own, default=0) for own in line] for line in owners]
        assert labels_of(images, number) == expected
    assert any(IGNORED in line for number in range(8) for line in labels_of(images, number))


def test_stuff_and_folders_lie_in_folders_beside_each_other(tmp_path):
    root = write_pixels(tmp_path / "one")
    first = data("folder", root)
    for split, coco in (("train", "train2017"), ("val", "val2017")):
        (tmp_path / "two/images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "two/masks").mkdir(exist_ok=True)
        (tmp_path / "stuff/stuffthingmaps").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"two/images/{split}").symlink_to(root / split / "images")
        (tmp_path / f"two/masks/{split}").symlink_to(root / split / "masks")
        (tmp_path / f"stuff/{coco}").symlink_to(root / split / "images")
        (tmp_path / f"stuff/stuffthingmaps/{coco}").symlink_to(root / split / "masks")
    for name, folder in (("folder", "two"), ("coco-stuff", "stuff")):
        second = data(name, tmp_path / folder, classes=CLASSES)
        assert second.class_names == first.class_names == CLASSES
        for own, other in zip(second.val_set, first.val_set, strict=True):
            assert torch.equal(own.image, other.image)
            assert torch.equal(own.labels, other.labels)


def test_a_mask_of_a_picture_on_its_side_is_turned_with_it(tmp_path):
    values = np.arange(12).reshape(3, 4)
    picture = Image.fromarray(np.repeat(values[:, :, None] * 20, 3, 2).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a/x.png", exif=exif)
    save(tmp_path / "a/mask.png", values)
    from matchdistill.data.pictures import read_picture

    read = read_picture(tmp_path / "a/x.png")
    masks = PngMasks([str(tmp_path / "a/mask.png")], lookup({number: number for number in range(12)}))
    turned = masks.read(0, read.image.size, read.orientation)
    assert np.array_equal(turned * 20, np.asarray(read.image)[..., 0])
    check_masks([str(tmp_path / "a/x.png")], masks, "training")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "train/masks/003.png").unlink(), "1 of 8 images of .* have no mask: 003; expected"),
        (lambda root: save(root / "val/masks/001.png", np.zeros((5, 6))), "it has 6 x 5 pixels, its image 48 x 28"),
        (lambda root: save(root / "val/masks/001.png", np.full((28, 48), 9)), "value 9, which is no class: expected 0 to 2"),
        (lambda root: save(root / "val/masks/001.png", np.zeros((28, 48, 3))), "in colours .RGB.: expected a number"),
        (lambda root: (root / "val/masks/001.png").write_bytes(b"PNG"), "001.png cannot be used"),
        (lambda root: (root / "classes.txt").unlink(), "has no classes.txt"),
        (lambda root: (root / "classes.txt").write_text("one\none\n"), "has 2 names: expected 2 to 255, each once"),
        (lambda root: (root / "val").rename(root / "other"), "has no folder val/images"),
        (lambda root: save(root / "train/images/003.bmp", np.zeros((4, 4, 3))), "have the same name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path, change, said):
    root = write_pixels(tmp_path / "set")
    change(root)
    with pytest.raises(ValueError, match=said) as caught:
        data("folder", root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cityscapes", "coco", "coco-panoptic"])
def test_sets_with_classes_of_their_own_take_no_others(tmp_path, name):
    with pytest.raises(ValueError, match=f"data.classes is given, but {name} has its own: leave it out"):
        data(name, tmp_path, classes=["a", "b"])


@pytest.mark.parametrize(("part", "said"), [("train", "training"), ("val", "validation")])
@pytest.mark.parametrize(("value", "ignore"), [(255, []), (1, [1])])
def test_masks_in_which_nothing_counts(tmp_path, part, said, value, ignore):
    root = write_pixels(tmp_path / "set", train=2, val=2)
    for path in sorted((root / part / "masks").iterdir()):
        save(path, np.full_like(np.asarray(Image.open(path)), value))
        with (
            pytest.raises(ValueError, match=f"no pixel of the {said} masks .*data.ignore")
            if path.stem == "001"
            else (contextlib.nullcontext())
        ):
            data("folder", root, ignore=ignore)
    data("folder", root, ignore=ignore, check_masks=False)


@pytest.mark.parametrize("check", [True, False])
def test_a_set_in_which_all_classes_are_ignored(tmp_path, check):
    root = write_pixels(tmp_path / "set", train=2, val=2)
    with pytest.raises(ValueError, match=r"data.ignore is \[0, 1, 2\], which leaves no class to learn"):
        data("folder", root, ignore=[0, 1, 2], check_masks=check)
    data("folder", root, ignore=[0, 1], check_masks=check)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Straße\ncross\ndisc\n".encode("utf-8-sig"), None),
        ("Straße\r\ncross\r\ndisc".encode(), None),
        ("Straße\ncross\ndisc\n".encode("latin-1"), r"classes.txt is not text in UTF-8 .*: save it as UTF-8"),
        ("Straße\ncross\ndisc\n".encode("utf-16"), r"classes.txt is not text in UTF-8 .*: save it as UTF-8"),
    ],
)
def test_names_of_classes_as_editors_save_them(tmp_path, content, said):
    root = write_pixels(tmp_path / "set", train=1, val=1)
    (root / "classes.txt").write_bytes(content)
    if said is None:
        assert data("folder", root).class_names == ["Straße", "cross", "disc"]
        return
    with pytest.raises(ValueError, match=said):
        data("folder", root)


def test_masks_are_checked_when_they_are_used_if_not_before(tmp_path):
    root = write_pixels(tmp_path / "set")
    save(root / "val/masks/001.png", np.full((28, 48), 9))
    found = data("folder", root, check_masks=False)
    with pytest.raises(ValueError, match=r"masks/001.png cannot be used: it has the value 9"):
        list(found.val_dataloader())

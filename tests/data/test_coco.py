import os
import re
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from matchdistill.data.annotations import read_coco
from matchdistill.data.coco import CocoDataset

TRAIN = "instances_train2017.json"


def read(root, split="train2017", masks=True, bad="refuse"):
    training = split == "train2017"
    return read_coco(root / "annotations" / f"instances_{split}.json", root / split, training, masks, bad, root)


def samples(root, *arguments, flip=False):
    dataset = CocoDataset(read(root, *arguments)[0], flip, skip_corrupt=False)
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_everything_as_pycocotools_reads_it(coco_root, split):
    coco = pytest.importorskip("pycocotools.coco").COCO(coco_root / "annotations" / f"instances_{split}.json")
    _, categories = read(coco_root, split)
    assert categories == {3: "shoe", 17: "coat", 90: "bag"}
    got = samples(coco_root, split)
    assert len(got) == len(coco.imgs)
    count = 0
    for (pixels, target), (image_id, entry) in zip(got, coco.imgs.items(), strict=True):
        stored = np.asarray(Image.open(coco_root / split / entry["file_name"]))
        assert pixels.shape == (3, entry["height"], entry["width"])
        torch.testing.assert_close(pixels, torch.tensor(stored / 255).permute(2, 0, 1).float())
        notes = coco.imgToAnns[image_id]
        if split == "train2017":
            notes = [note for note in notes if not note["iscrowd"]]
        count += len(notes)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (note["bbox"] for note in notes)]
        expected = {
            "boxes": torch.tensor(corners).reshape(-1, 4).float(),
            "labels": torch.tensor([{3: 1, 17: 2, 90: 3}[note["category_id"]] for note in notes], dtype=torch.int64),
            "area": torch.tensor([note["area"] for note in notes]).float(),
            "iscrowd": torch.tensor([note["iscrowd"] for note in notes], dtype=torch.int64),
            "image_id": torch.tensor(image_id),
            "masks": torch.tensor(np.array([coco.annToMask(note) for note in notes]))
            .reshape(-1, *pixels.shape[1:])
            .byte(),
        }
        if image_id == 5:  # one box ends at 34.4 px, the image at 34
            expected["boxes"][:, 3] = 34
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(target[key], value, rtol=0, atol=0)
    assert count == 6


def test_masks_only_if_they_are_asked_for(coco_root, edit_coco):
    edit_coco(lambda content: [note.pop("segmentation") for note in content["annotations"]])
    for _, target in samples(coco_root, "train2017", False):
        assert "masks" not in target


def test_targets_share_no_memory_with_the_data_set(coco_root):
    for _, target in samples(coco_root):
        assert target["boxes"].untyped_storage().nbytes() == 16 * len(target["boxes"])
        assert target["image_id"].untyped_storage().nbytes() == 8


def test_subset_keeps_what_belongs_together(coco_root):
    images, _ = read(coco_root)
    whole = samples(coco_root)
    part = CocoDataset(images.subset(torch.tensor([3, 0])), flip=False, skip_corrupt=False)
    for (pixels, target), number in zip((part[0], part[1]), (3, 0), strict=True):
        assert torch.equal(pixels, whole[number][0])
        assert all(torch.equal(target[key], value) for key, value in whole[number][1].items())


def test_flip_mirrors_half_of_the_images_with_their_boxes_and_masks(coco_root):
    dataset = CocoDataset(read(coco_root)[0], flip=True, skip_corrupt=False)
    plain, target = samples(coco_root)[0]
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(100):
        pixels, flipped = dataset[0]
        if torch.equal(pixels, plain):
            assert all(torch.equal(flipped[key], value) for key, value in target.items())
            continue
        mirrored += 1
        assert torch.equal(pixels, plain.flip(2))
        assert flipped["boxes"].tolist() == [[40 - x2, y1, 40 - x1, y2] for x1, y1, x2, y2 in target["boxes"].tolist()]
        assert torch.equal(flipped["masks"], target["masks"].flip(2))
        assert all(torch.equal(flipped[key], target[key]) for key in ("labels", "area", "iscrowd", "image_id"))
    assert 35 < mirrored < 65


def test_area_and_crowd_may_be_absent(coco_root, edit_coco):
    def change(content):
        for note in content["annotations"]:
            del note["area"]
            if not note["iscrowd"]:
                del note["iscrowd"]

    edit_coco(change)
    _, target = samples(coco_root)[0]
    torch.testing.assert_close(target["area"], torch.tensor([14 * 6, 15.5 * 12.25]))
    assert target["iscrowd"].tolist() == [0, 0]


def note_of(content, number):
    return next(note for note in content["annotations"] if note["id"] == number)


def change_note(number, **values):
    return lambda content: note_of(content, number).update(values)


def change_image(number, **values):
    return lambda content: next(image for image in content["images"] if image["id"] == number).update(values)


BAD = {
    "outside": (change_note(8, bbox=[20, 10, 21.5, 12]), "annotation 8: its box [20, 10, 21.5, 12] leaves its image of"),
    "below": (change_note(8, bbox=[20, 10, 2, 21.5]), "annotation 8: its box [20, 10, 2, 21.5] leaves its image"),
    "left": (change_note(8, bbox=[-1.5, 10, 5, 5]), "annotation 8: its box [-1.5, 10, 5, 5] leaves its image"),
    "above": (change_note(8, bbox=[3, -1.5, 5, 5]), "annotation 8: its box [3, -1.5, 5, 5] leaves its image"),
    "inverted": (change_note(8, bbox=[20, 10, -5, 5]), "annotation 8: its box [20, 10, -5, 5] is inverted or has no area"),
    "flat": (change_note(8, bbox=[20, 10, 5, 0]), "annotation 8: its box [20, 10, 5, 0] is inverted or has no area"),
    "beside": (change_note(8, bbox=[-0.8, 10, 0.8, 5]), "annotation 8: its box [-0.8, 10, 0.8, 5] is inverted or has no"),
    "infinite": (change_note(8, bbox=[20, 10, float("inf"), 5]), "annotation 8: its box [20, 10, inf, 5] is not x, y,"),
    "no number": (change_note(8, bbox=[20, float("nan"), 5, 5]), "annotation 8: its box [20, nan, 5, 5] is not x, y, width"),
    "text": (change_note(8, bbox=["20", 10, 5, 5]), "annotation 8: its box ['20', 10, 5, 5] is not x, y, width, height"),
    "three": (change_note(8, bbox=[20, 10, 5]), "annotation 8: its box [20, 10, 5] is not x, y, width, height"),
    "no box": (lambda content: note_of(content, 8).pop("bbox"), "annotation 8: its box [] is not x, y, width, height"),
    "category": (change_note(8, category_id=4), "annotation 8: its category_id 4 is not in the file"),
    "image": (change_note(8, image_id=4), "annotation 8: its image_id 4 is not in the file"),
    "list as image": (change_note(8, image_id=[4]), "annotation 8: its image_id [4] is not in the file"),
    "area": (change_note(8, area=-1), "annotation 8: its area -1 is not a number from 0 on"),
    "text as area": (change_note(8, area="big"), "annotation 8: its area 'big' is not a number from 0 on"),
    "crowd": (change_note(8, iscrowd="yes"), "annotation 8: its iscrowd 'yes' is neither 0 nor 1"),
    "mask": (change_note(8, segmentation=[[1, 2, 3, 4]]), "annotation 8: a polygon of its mask is not x, y of three"),
    "no mask": (lambda content: note_of(content, 8).pop("segmentation"), "annotation 8: it has no mask"),
    "runs": (change_note(8, segmentation={"size": [30, 40], "counts": [7]}), "annotation 8: the run lengths of its mask"),
    "leading out": (change_image(581, file_name="../../gone.jpg"), "its file_name '../../gone.jpg' leads out of"),
    "absolute": (change_image(581, file_name="/gone.jpg"), "its file_name '/gone.jpg' leads out of"),
    "zero byte": (change_image(581, file_name="a\0.jpg"), "is missing"),
    "no id": (lambda content: content["annotations"].append({"id": "9"}), "the annotation at place 8 has no whole number"),
    "no object": (lambda content: content["annotations"].append(None), "the annotation at place 8 has no whole number"),
    "large id": (lambda content: content["images"].append({"id": 2**63}), "the image at place 7 has no whole number as id"),
    "image twice": (lambda content: content["images"].append(content["images"][0]), "image 581 is there twice"),
    "no name": (change_image(581, file_name=None), "image 581 has no file_name"),
    "no height": (change_image(581, height=None), "image 581 has no height and width in whole pixels"),
    "zero width": (change_image(581, width=0), "image 581 has no height and width in whole pixels"),
    "missing": (change_image(581, file_name="sub/gone.jpg"), "sub/gone.jpg is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_are_refused_or_skipped(coco_root, edit_coco, name):
    before = samples(coco_root)
    change, message = BAD[name]
    edit_coco(change)
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        read(coco_root)
    assert TRAIN in str(info.value)
    assert "--data.bad_annotations=skip" in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.warns(UserWarning, match=f"{TRAIN}: 1 images or annotations are left out: .*{re.escape(message)}"):
        images, _ = read(coco_root, bad="skip")
    got = [CocoDataset(images, flip=False, skip_corrupt=False)[i] for i in range(len(images.paths))]
    if message.startswith("annotation 8:"):  # the second of image 581
        assert [len(target["labels"]) for _, target in got] == [1, 0, 1, 2, 1, 0]
        before[0] = before[0][0], {key: value[:1] if value.dim() else value for key, value in before[0][1].items()}
    elif any(part in message for part in ("581 has", "missing", "leads out")):
        del before[0]
    for (_, target), (_, expected) in zip(got, before, strict=True):
        assert all(torch.equal(target[key], value) for key, value in expected.items())


def test_first_ten_bad_entries_are_named_and_the_others_counted(coco_root, edit_coco):
    def change(content):
        content["annotations"] += [{"id": 100 + i, "image_id": 581, "category_id": 4} for i in range(13)]

    edit_coco(change)
    with pytest.raises(ValueError, match=r"annotation 109: .*; and 3 more: repair them") as info:
        read(coco_root)
    assert str(info.value).count("category_id 4") == 10
    with pytest.warns(UserWarning, match="13 images or annotations are left out: .*; and 3 more"):
        images, _ = read(coco_root, bad="skip")
    assert len(images.annotations.labels) == 6


def test_crowds_of_training_images_need_no_mask(coco_root, edit_coco):
    edit_coco(change_note(55, segmentation="none", bbox=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(coco_root)[0].annotations.labels) == 6


def test_validation_boxes_stay_as_they_are(coco_root):
    (coco_root / "train2017").rename(coco_root / "images")
    path = coco_root / "annotations" / TRAIN
    images, _ = read_coco(path, coco_root / "images", training=False, masks=True, bad="refuse")
    assert len(images.annotations.labels) == 7
    torch.testing.assert_close(images.annotations.boxes[-1], torch.tensor([10, 20, 40, 34.4]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged or not JSON"),
        ('{"images": [', "is damaged or not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"images": [], "categories": []}', "annotations is missing or has an unexpected type"),
        ('{"images": [], "annotations": [], "categories": []}', "it has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 3}]}', "category 3 has no name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": null}]}',
            "the category at place 1 has no whole number",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}',
            "category 3 is there twice",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 3, "name": "a"}]}', "has no images that can be used"),
    ],
)
@pytest.mark.parametrize("bad", ["refuse", "skip"])
def test_broken_files(coco_root, content, message, bad):
    (coco_root / "annotations" / TRAIN).write_text(content)
    with pytest.raises(ValueError, match=f"{TRAIN}.*{message}") as info:
        read(coco_root, bad=bad)
    assert "\n" not in str(info.value)


def test_missing_file(coco_root):
    with pytest.raises(ValueError, match=r"instances_test\.json cannot be read \(FileNotFoundError"):
        read(coco_root, "test")


def test_images_in_folders_and_without_any_annotation(coco_root, edit_coco):
    (coco_root / "train2017" / "deep" / "er").mkdir(parents=True)
    (coco_root / "train2017" / "000000000012.png").rename(coco_root / "train2017" / "deep" / "er" / "a.png")
    edit_coco(change_image(12, file_name="deep/er/a.png"))
    edit_coco(lambda content: content["annotations"].clear())
    got = samples(coco_root)
    assert [target["image_id"].item() for _, target in got] == [581, 12, 77, 400, 5, 93]
    for pixels, target in got:
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape == (0, *pixels.shape[1:])
        assert [target[key].dtype for key in ("boxes", "labels", "area", "iscrowd", "masks")] == [
            torch.float32, torch.int64, torch.float32, torch.int64, torch.uint8
        ]  # fmt: skip


def test_image_of_another_size_than_annotated(coco_root):
    path = coco_root / "train2017" / "000000000581.png"
    Image.open(path).resize((41, 30)).save(path)
    dataset = CocoDataset(read(coco_root)[0], flip=False, skip_corrupt=False)
    message = re.escape(f"{path} cannot be read (ValueError: its size is (41, 30), in the annotations (40, 30))")
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_image_that_is_stored_on_its_side(coco_root):
    path = coco_root / "train2017" / "000000000581.png"
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    torch.testing.assert_close(
        samples(coco_root)[0][0], torch.tensor(np.asarray(upright) / 255).permute(2, 0, 1).float()
    )


def turned(values, orientation):
    """Stored values (H, W) that are to be turned as EXIF says, by its definition of rows and columns, upright."""
    return {
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a),
    }[orientation](values)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_and_masks_of_a_picture_on_its_side_are_turned_with_it(coco_root, orientation):
    """Annotated as stored: each box of the upright picture must be around the pixels that the stored box is around."""
    before = samples(coco_root)[0][1]
    height, width = before["masks"].shape[1:]
    exif = Image.Exif()
    exif[274] = orientation
    number = np.arange(height * width).reshape(height, width)  # tells each pixel
    stored = np.stack([number >> 8, number & 255, number * 0], 2).astype(np.uint8)
    Image.fromarray(stored).save(coco_root / "train2017" / "000000000581.png", exif=exif)
    pixels, target = samples(coco_root)[0]
    upright = turned(number, orientation)
    found = (pixels * 255).round().int()
    assert np.array_equal(found[0] * 256 + found[1], upright)
    for mask, expected in zip(target["masks"], before["masks"], strict=True):
        assert np.array_equal(mask, turned(expected.numpy(), orientation))
    for box, expected in zip(target["boxes"], before["boxes"], strict=True):
        left, top, right, bottom = (int(value) for value in box.round())
        x0, y0, x1, y1 = (int(value) for value in expected.round())
        assert set(upright[top:bottom, left:right].flat) == set(number[y0:y1, x0:x1].flat)


def test_ids_of_annotations_may_repeat(coco_root, edit_coco):
    def same(content):
        for entry in content["annotations"]:
            entry["id"] = 0

    before = samples(coco_root)
    edit_coco(same)
    with pytest.warns(
        UserWarning, match="ids of annotations are there more than once, such as 0: all of them are used"
    ):
        after = samples(coco_root)
    assert [len(target["boxes"]) for _, target in before] == [len(target["boxes"]) for _, target in after]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_and_byte_order_marks(coco_root, encoding):
    before = samples(coco_root)
    path = coco_root / "annotations" / TRAIN
    path.write_bytes(path.read_text().encode(encoding))
    assert len(samples(coco_root)) == len(before)


def test_file_names_in_another_unicode_form_and_in_capitals(coco_root, edit_coco):
    name, other = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    (coco_root / "train2017" / "000000000581.png").rename(coco_root / "train2017" / other)
    edit_coco(change_image(581, file_name=name))
    assert len(samples(coco_root)) == 6
    edit_coco(change_image(581, file_name="CAFÉ.png"))
    with pytest.raises(ValueError, match="is missing; did you mean"):
        samples(coco_root)


def test_names_that_lead_out_may_be_allowed_and_those_inside_are(coco_root, edit_coco, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "a.png"
    (coco_root / "train2017" / "000000000581.png").rename(other)
    edit_coco(change_image(581, file_name=str(other)))
    with pytest.raises(ValueError, match=r"--data\.outside=true allows it"):
        samples(coco_root)
    path = coco_root / "annotations" / TRAIN
    assert len(read_coco(path, coco_root / "train2017", True, True, "refuse", None)[0].paths) == 6
    other.rename(coco_root / "inside.png")
    edit_coco(change_image(581, file_name="../inside.png"))
    assert len(samples(coco_root)) == 6
    (coco_root / "inside.png").rename(other)
    (coco_root / "train2017" / "inside.png").symlink_to(other)
    edit_coco(change_image(581, file_name="inside.png"))
    assert len(samples(coco_root)) == 6


@pytest.mark.timeout(20)
def test_pipes_do_not_hang(coco_root):
    (coco_root / "train2017" / "000000000581.png").unlink()
    os.mkfifo(coco_root / "train2017" / "000000000581.png")
    with pytest.raises(ValueError, match=r"581\.png is missing"):
        samples(coco_root)
    (coco_root / "annotations" / TRAIN).unlink()
    os.mkfifo(coco_root / "annotations" / TRAIN)
    with pytest.raises(ValueError, match=r"is a pipe, not a file"):
        samples(coco_root)


def test_gray_and_transparent_images_become_rgb(coco_root):
    for name, mode in (("000000000581.png", "L"), ("000000000012.png", "RGBA"), ("000000000077.png", "P")):
        path = coco_root / "train2017" / name
        Image.open(path).convert(mode).save(path)
    assert {pixels.shape[0] for pixels, _ in samples(coco_root)} == {3}


def test_corrupt_images_are_named_or_left_out(coco_root):
    path = coco_root / "train2017" / "000000000012.png"
    path.write_bytes(path.read_bytes()[:100])
    images, _ = read(coco_root)
    with pytest.raises(ValueError, match=rf"{path} cannot be read .*--data.skip_corrupt=true"):
        CocoDataset(images, flip=False, skip_corrupt=False).__getitems__([0, 1])
    dataset = CocoDataset(images, flip=False, skip_corrupt=True)
    with pytest.warns(UserWarning, match="is skipped"):
        pixels, targets = dataset.__getitems__([0, 1, 3])
    assert [target["image_id"].item() for target in targets] == [581, 400]
    assert len(pixels) == 2
    assert [target["image_id"].item() for target in dataset.__getitems__([1])[1]] == [77]
    assert dataset.corrupt_paths == [str(path)]

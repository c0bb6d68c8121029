import csv
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.ops import box_convert

from detectors import CATEGORIES, SMALL, as_found
from matchdistill import cli
from matchdistill.data import DetectionData, ImageData
from matchdistill.data.masks import check_mask, draw_mask
from matchdistill.models import build_detector
from matchdistill.runs.predict import Predictor, drawn_paths, find_pictures, image_ids
from matchdistill.runs.store import describe_student, load_student
from matchdistill.tasks.detection.predicting import BoxPredicting
from records import TINY

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore::FutureWarning"),
]

CLASSES = ["a, quoted", "blue", "green"]


def write_classes(root: Path) -> Path:
    """Images of three classes that a tiny student tells apart, though not all of them."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 14)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = chance.integers(20, 40, 2)
                pixels = chance.integers(0, 200, (*size, 3), dtype=np.uint8)
                pixels[..., label] += chance.integers(0, 30, dtype=np.uint8)
                suffix = ("png", "jpg", "bmp")[number % 3]
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


def trained(folder: Path, values: dict, formats: tuple[str, ...]) -> Path:
    path, out = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["fit", str(path), "--out", str(out)]) == 0
    for kind in formats:
        assert cli.main(["export", str(out), "--format", kind, "--trust"]) == 0
    return out


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs make no pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matchdistill.runs.train.write_report", lambda folders: None)
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, quick):
    """A run on class folders, exported in all formats; the images are in the folder `images` beside it."""
    folder = tmp_path_factory.mktemp("classes")
    data = {"name": "folder", "root": str(write_classes(folder / "images")), "image_size": 16, "batch_size": 20}
    values = {**TINY, "data": data, "distillation": {"method": "none"}, "training": {"epochs": 3, "lr": 0.05}}
    return trained(folder, values, ("safetensors", "onnx", "pt2"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory, quick, coco):
    """A run of a detector, exported in both formats."""
    folder = tmp_path_factory.mktemp("boxes")
    torch.manual_seed(0)
    network = as_found(build_detector(SMALL["student"]["name"], 3, **SMALL["student"]["options"]))
    for name, parameter in network.head.classification_head.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)  # or it would find nothing
    torch.save(network.state_dict(), folder / "student.pt")
    values = {**SMALL, "data": {**SMALL["data"], "root": str(coco)}, "distillation": {"method": "none"}}
    values["student"] = {**SMALL["student"], "weights": str(folder / "student.pt")}
    values["training"] = {"epochs": 1, "lr": 1e-5}
    return trained(folder, values, ("safetensors", "onnx"))


@pytest.fixture
def predict(capfd, tmp_path, monkeypatch):
    """Run predict, which succeeds and says nothing on standard error; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def predict(*arguments):
        capfd.readouterr()
        code = cli.main(["predict", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert (code, err) == (0, "")
        return out

    return predict


@pytest.fixture
def mistake(capfd, tmp_path, monkeypatch):
    """Run predict, which is mistaken and writes nothing; returns the one line that it said."""
    monkeypatch.chdir(tmp_path)

    def mistake(*arguments):
        capfd.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["predict", *map(str, arguments)]) == 2
        err = capfd.readouterr().err
        assert re.fullmatch(r"matchdistill: error: [^\n]+\n", err), err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return mistake


def rows(path):
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def val_of(run):
    return run.parent / "images" / "val"


SOURCES = ("", "student.safetensors", "last.ckpt", "export", "export/model.safetensors", "export/model.onnx")


@pytest.mark.parametrize("source", SOURCES)
def test_a_classifier_predicts_as_it_was_measured(predict, classifier, source):
    printed = predict(classifier / source, val_of(classifier), "--out=found.csv", "--batch_size=17")
    assert re.search(r"42 images in \d+\.\d\d s, \d+ images per second\nfound.csv\n$", printed)
    assert "and 22 more rows" in printed
    found = rows("found.csv")
    assert list(found[0]) == ["path", "label", "score"]
    right = [row["label"] == Path(row["path"]).parent.name for row in found]
    expected = json.loads((classifier / "metrics.json").read_text())["student"]["top1"]
    assert 0.4 < expected < 1
    assert sum(right) / 42 == pytest.approx(expected)


def test_runs_of_the_first_versions(predict, classifier, tmp_path):
    """Which did not say how images are prepared, as all had ImageNet's way, nor that digits are gray and resized whole."""
    described, old = describe_student(classifier), tmp_path / "old"
    shutil.copytree(classifier, old, ignore=shutil.ignore_patterns("export"))
    first = {name: value for name, value in described.items() if name not in ("preparation", "gray")}
    (old / "model.json").write_text(json.dumps(first))
    assert describe_student(old) == described
    images = classifier.parent / "images" / "val" / "blue"
    found = [predict(run, images).partition("images in")[0] for run in (old, classifier)]
    assert found[0] == found[1]
    assert cli.main(["export", str(old)]) == 0
    assert json.loads((old / "export/config.json").read_text()) == json.loads(
        (classifier / "export/config.json").read_text()
    )
    (old / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "data": {"name": "digits"}}))
    (old / "model.json").write_text(json.dumps({**first, "image_size": 16}))
    digits = describe_student(old)
    assert (digits["gray"], digits["preparation"]) == (True, ImageData("digits").preparation.plain())
    (old / "model.json").write_text(json.dumps({name: each for name, each in first.items() if name != "image_size"}))
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        describe_student(old)


def test_a_program_that_can_run_code_needs_trust(predict, mistake, classifier):
    program = classifier / "export" / "model.pt2"
    assert "give --trust if it is your own" in mistake(program, val_of(classifier))
    assert "42 images" in predict(program, val_of(classifier), "--trust")


def test_each_image_is_prepared_as_in_validation(classifier):
    data = ImageData("folder", val_of(classifier).parent, image_size=16)
    data.setup()
    predictor = Predictor(classifier, top=3)
    found = predictor(data.val_set.paths)
    assert [own.path for own in found] == data.val_set.paths
    for (images, _), own in zip(data.val_set, found, strict=True):
        with torch.no_grad():
            expected = predictor.network(images[None]).softmax(1)[0]
        torch.testing.assert_close(torch.tensor(own.scores), expected.sort(descending=True).values)
        assert own.labels == [CLASSES[label] for label in expected.argsort(descending=True)]
        assert (own.label, own.score) == (own.labels[0], own.scores[0])


@pytest.mark.parametrize("source", ["", "export", "export/model.onnx"])
def test_small_gray_images_are_prepared_as_their_set_is(tmp_path, quick, source):
    values = {**TINY, "distillation": {"method": "none"}, "data": {**TINY["data"], "val_limit": 30, "image_size": 12}}
    run = trained(tmp_path, values, ("safetensors", "onnx"))
    data = ImageData("digits", val_limit=30, image_size=12)
    data.setup()
    original = ImageData("digits", val_limit=30, image_size=8)
    original.setup()
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for path, image in zip(paths, original.val_set.data.images, strict=True):
        Image.fromarray(image.numpy()).save(path)
    predictor = Predictor(run / source, top=10)
    images, _ = data.val_set.__getitems__(range(30))
    with torch.no_grad():
        expected = predictor.network(images).softmax(1).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([own.scores for own in predictor(paths)]), expected, atol=1e-6, rtol=0)
    prepared = [predictor.predicting.prepare(Image.open(path).convert("RGB")) for path in paths]
    assert torch.stack(prepared).equal(images)


def test_further_classes_are_further_columns(predict, classifier):
    predict(classifier, val_of(classifier) / "blue", "--out=deep/found.csv", "--top=2")
    predict(classifier, val_of(classifier) / "blue", "--out=deep/found.json", "--top=99")
    found, told = rows("deep/found.csv"), json.loads(Path("deep/found.json").read_text())
    assert list(found[0]) == ["path", "label", "score", "label_2", "score_2"]
    assert len(found) == len(told) == 14
    for row, entry in zip(found, told, strict=True):
        assert [row["label"], row["label_2"]] == [each["label"] for each in entry["top"]][:2]
        assert sum(each["score"] for each in entry["top"]) == pytest.approx(1)
        assert (row["path"], float(row["score"])) == (entry["path"], pytest.approx(entry["score"]))
    assert sorted(path.name for path in Path("deep").iterdir()) == ["found.csv", "found.json"]


def test_files_folders_and_patterns_in_natural_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("f/frame10.png", "f/frame9.PNG", "f/b/1.jpg", "f/note.txt", "f/.hidden.png", "x[1].png", "empty/a.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    folder = ["f/b/1.jpg", "f/frame9.PNG", "f/frame10.png"]
    assert find_pictures([Path("f")]) == folder
    assert find_pictures([Path("f/frame10.png"), Path("f")]) == [folder[2], *folder[:2]]
    assert find_pictures([Path("f/*.png"), Path("x[1].png")]) == [folder[2], "x[1].png"]
    assert find_pictures([Path("**/*.jpg")]) == folder[:1]
    for place, problem in {"empty": "has no images", "none*.jpg": "nothing fits it", "no.jpg": "no such file"}.items():
        with pytest.raises(ValueError, match=problem):
            find_pictures([Path(place)])


def test_names_of_any_bytes(predict, classifier, tmp_path):
    name = os.fsdecode(b'caf\xe9 "1",\n.png')
    shutil.copy(val_of(classifier) / "blue" / "0.png", tmp_path / name)
    predict(classifier, name, "--out=found.csv")
    predict(classifier, name, "--out=found.json")
    assert rows("found.csv")[0]["path"] == json.loads(Path("found.json").read_text())[0]["path"] == name


def test_damaged_images(predict, mistake, classifier, tmp_path):
    shutil.copytree(val_of(classifier) / "blue", tmp_path / "in")
    Path(tmp_path, "in", "3.png").write_bytes(b"damaged")
    options = ("--out=found.csv", "--draw=drawn", "--batch_size=1")
    told = mistake(classifier, "in", *options)
    assert "image in/3.png is not an image that Pillow can read: repair" in told
    assert "skip such images with --skip_corrupt" in told
    assert "more than max_pixels, 9" in mistake(classifier, "in", "--max_pixels=9")
    with pytest.warns(UserWarning, match=r"image in/3.png is not an image that Pillow can read and is skipped"):
        assert "13 images" in predict(classifier, "in", *options, "--skip_corrupt")
    assert "in/3.png" not in {row["path"] for row in rows("found.csv")}
    assert len(list(Path("drawn").iterdir())) == len(rows("found.csv")) == 13
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "none of the 1 images" in mistake(classifier, "in/3.png", "--skip_corrupt")


def test_classes_are_written_below_the_images(predict, classifier):
    images = val_of(classifier)
    predict(classifier, images, "--draw=drawn", "--top=3")
    assert sorted(path.parent.name for path in Path("drawn").rglob("*.*")) == sorted(CLASSES * 14)
    for suffix in ("0.png", "1.jpg", "2.bmp.png"):
        with (
            Image.open(Path("drawn", "blue", suffix)) as drawn,
            Image.open(images / "blue" / suffix.replace("bmp.png", "bmp")) as original,
        ):
            assert drawn.height > original.height + 20
            if suffix != "1.jpg":
                inside = np.asarray(drawn)[: original.height, : original.width]
                assert (inside == np.asarray(original)).all()


def test_no_image_is_drawn_over(mistake, classifier, tmp_path):
    shutil.copytree(val_of(classifier) / "blue", tmp_path / "in")
    assert "in/0.png is one of the images: draw into another folder" in mistake(classifier, "in", "--draw=in")
    assert drawn_paths([], Path("x")) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--out=found.txt"], "--out found.txt: expected a name that ends in .csv or .json"),
        (["--top=0"], "top is 0: expected a whole number from 1 on"),
        (["--batch_size=0"], "batch_size is 0"),
        (["--workers=-1"], "workers is -1"),
        (["--device=abacus"], "device 'abacus': expected auto, cpu, or a GPU that is here"),
    ],
)
def test_options_that_do_not_fit(mistake, classifier, arguments, problem):
    assert problem in mistake(classifier, val_of(classifier), *arguments)


def test_places_without_a_student(mistake, classifier, tmp_path):
    images = val_of(classifier)
    assert "nowhere: there is no such file or folder" in mistake("nowhere", images)
    assert "holds no student: expected the folder of a run, with recipe.yaml" in mistake(images, images)
    (tmp_path / "run").mkdir()
    shutil.copy(classifier / "recipe.yaml", "run")
    assert "holds no finished run" in mistake("run", images)
    (tmp_path / "all" / "cells").mkdir(parents=True)
    assert "all is the folder of a comparison: name one of its runs" in mistake("all", images)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": None}, "describes no student"),
        ({"task": "guessing"}, "describes no student"),
        ({"num_classes": "3"}, "num_classes is missing or has an unexpected type"),
        ({"label_names": ["one"]}, "label_names is not a list of 3 names"),
        ({"mean": None}, "does not say how images are prepared"),
        ({"crop_pct": 0.0}, "does not say how images are prepared"),
        ({"interpolation": "cubism"}, "images cannot be prepared as it says"),
        ({"input_size": [1, 16, 16]}, "expected square images of three channels"),
        ({"white": -1}, "white is -1"),
        ({"name": "os:system"}, "it builds its network by importing 'os'"),
        ({"num_classes": 4, "label_names": None}, "these weights are for 3 classes"),
    ],
)
def test_a_damaged_config(mistake, classifier, tmp_path, changes, problem):
    shutil.copytree(classifier / "export", tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert problem in mistake("export", val_of(classifier))


def test_a_program_for_other_images(mistake, classifier, tmp_path):
    shutil.copytree(classifier / "export", tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 2, "label_names": None}))
    assert "the student gives (2, 3) for 2 images, but the data has 2 classes" in mistake(
        "export/model.onnx", val_of(classifier)
    )


def test_a_student_of_timm_from_its_folder_for_the_hub(predict, tmp_path, quick, classifier):
    values = yaml.safe_load((classifier / "recipe.yaml").read_text())
    values["student"] = {"name": "timm:resnet10t", "options": {"drop_rate": 0.1}}
    values["data"] |= {"image_size": 32, "white": 255.0}
    values["training"]["epochs"] = 1
    run = trained(tmp_path, values, ("safetensors",))
    config = json.loads((run / "export" / "config.json").read_text())
    assert (config["architecture"], config["white"]) == ("resnet10t", 255)
    for number, source in enumerate((run, run / "export")):
        predict(source, val_of(classifier), f"--out={number}.csv", "--top=3")
    assert Path("0.csv").read_text() == Path("1.csv").read_text()


def test_workers_find_the_same(classifier):
    paths = find_pictures([val_of(classifier)])
    assert Predictor(classifier, workers=2)(paths) == Predictor(classifier)(paths)
    assert Predictor(classifier)(paths[0]) == Predictor(classifier)(paths[:1])
    assert Predictor(classifier)([]) == []


@pytest.mark.parametrize("source", ["", "export/model.safetensors"])
def test_a_detector_predicts_what_it_finds_in_validation(predict, detector, coco, source):
    predict(detector / source, coco / "val2017", "--out=found.json", "--batch_size=4", "--trust")
    found = json.loads(Path("found.json").read_text())
    assert found[0].keys() == {"image_id", "file_name", "category_id", "category", "bbox", "score"}
    data = DetectionData(coco, batch_size=4)
    data.setup()
    student, _ = load_student(detector, trust=True)
    with torch.no_grad():
        batches = [data.val_set.__getitems__(numbers)[0] for numbers in ([0, 1, 2, 3], [4])]
        expected = [own for images in batches for own in student(images)]
    for number, (path, own) in enumerate(zip(data.val_set.paths, expected, strict=True)):
        entries = [each for each in found if each["file_name"] == path]
        objects = own["labels"] > 0  # 0 is the background
        assert objects.any()
        assert {each["image_id"] for each in entries} == {number}  # the file's name
        corners = box_convert(torch.tensor([each["bbox"] for each in entries]), "xywh", "xyxy")
        order = own["scores"][objects].argsort(descending=True, stable=True)
        torch.testing.assert_close(corners, own["boxes"][objects][order], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor([each["score"] for each in entries]), own["scores"][objects][order])
        ids = data.category_ids[own["labels"][objects][order] - 1].tolist()
        assert [each["category_id"] for each in entries] == ids
        assert [each["category"] for each in entries] == [CATEGORIES[number] for number in ids]


def test_masks_are_results_that_coco_reads(coco):
    torch.manual_seed(0)
    box = torch.tensor([[4.0, 6.0, 20.0, 30.0], [0.0, 0.0, 9.0, 9.0]])
    masks = torch.zeros(2, 1, 40, 50)
    masks[0, 0, 6:30, 4:20] = 0.9
    given = {"boxes": box, "scores": torch.tensor([0.4, 0.8]), "labels": torch.tensor([2, 1]), "masks": masks}
    config = {"num_classes": 2, "label_names": ["a", "b"], "category_ids": [3, 7]}
    (found,) = BoxPredicting.of(config).find(lambda images: [given], ["x.png"], [])
    first, second = found.plain(5)
    assert (first["category_id"], second["category_id"], second["bbox"]) == (3, 7, [4, 6, 16, 24])
    for entry, own in ((first, masks[1]), (second, masks[0])):
        check_mask(entry["segmentation"], 40, 50)
        assert (draw_mask(entry["segmentation"], 40, 50) == (own[0] > 0.5).numpy()).all()
    drawn = np.asarray(found.drawn(Image.new("RGB", (50, 40))))
    assert (drawn[30, 12] > 0).any()
    config = {**config, "num_classes": 1, "label_names": ["a"], "category_ids": [3]}
    with pytest.raises(ValueError, match="it finds label 2, but there are the names of 1"):
        BoxPredicting.of(config).find(lambda images: [given], ["x.png"], [])
    with pytest.raises(ValueError, match="it has no category_ids"):
        BoxPredicting.of({**config, "category_ids": [1, 2]})


def test_boxes(predict, mistake, detector, coco):
    assert "give it if the folder is of your own making" in mistake(detector, coco / "val2017")
    predict(detector, coco / "val2017", "--out=all.csv", "--draw=drawn", "--top=3", "--trust")
    predict(detector / "export/model.onnx", coco / "val2017", "--out=program.csv", "--top=3")
    found, program = rows("all.csv"), rows("program.csv")
    assert list(found[0]) == ["path", "label", "score", "left", "top", "right", "bottom"]
    assert {row["label"] for row in found} <= {"cross", "disc", "bar"}
    assert max(sum(row["path"] == own["path"] for row in found) for own in found) == 3
    assert [row["label"] for row in found] == [row["label"] for row in program]
    sizes = {path.name: Image.open(path).size for path in Path("drawn").iterdir()}
    assert sizes == {path.name: Image.open(path).size for path in (coco / "val2017").iterdir()}


def test_numbers_of_images():
    assert image_ids(["a/012.jpg", "b/12.jpg"]) == [1, 2]
    assert image_ids([]) == []


def test_three_lines_of_code(classifier):
    from matchdistill import Predictor

    predictor = Predictor(str(classifier))
    found = predictor([str(val_of(classifier) / "blue" / name) for name in ("0.png", "1.jpg")])
    assert [own.label in CLASSES for own in found] == [True, True]
    with pytest.raises(ImportError, match="cannot import name 'Predicter'"):
        from matchdistill import Predicter  # noqa: F401

"""What an export folder says, held to those who read it: timm, the Hub's own parser, and the code that it shows."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from detectors import CATEGORIES
from matchdistill import cli
from matchdistill.data.folder import image_transform
from matchdistill.models import small_resnet
from matchdistill.models.preparation import IMAGENET
from matchdistill.runs.card import _results
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from records import run_of

ModelCard = pytest.importorskip("huggingface_hub").ModelCard

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

SIZE = 48
LABELS = ["heron", "wren"]


@pytest.fixture
def pictures(tmp_path):
    chance = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "val") for name in LABELS):
        (tmp_path / "birds" / split / name).mkdir(parents=True)
        for number in range(4):
            pixels = chance.integers(0, 255, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "birds" / split / name / f"{number}.jpg")
    return tmp_path / "birds"


def exported(out, *arguments):
    assert cli.main(["export", str(out), "--trust", *arguments]) == 0
    return ModelCard.load(out / "export" / "model_card.md"), json.loads((out / "export" / "config.json").read_text())


def blocks(card):
    return re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)


def test_timm_loads_its_own_student(tiny, pictures, tmp_path):
    out = tmp_path / "run"
    # A pooling that is not the architecture's own: it has to be built with it.
    student = ("--student.name=timm:test_resnet.r160_in1k", "--student.options={global_pool: max}")
    data = ("--data.name=folder", f"--data.root={pictures}", f"--data.image_size={SIZE}", "--data.batch_size=4")
    limits = ("--data.train_limit=8", "--data.val_limit=8", "--training.epochs=1", "--distillation.method=none")
    metrics = fit(tiny(*student, *data, *limits), out, quiet=True)
    card, config = exported(out)

    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("test_resnet", 2, LABELS)
    assert config["num_features"] == timm.create_model("test_resnet").num_features
    ours, _ = load_student(out, trust=True)
    weights = out / "export" / "model.safetensors"
    models = [
        timm.create_model(f"local-dir:{out}/export", pretrained=True),
        timm.create_model("test_resnet", num_classes=2, global_pool="max", checkpoint_path=str(weights)),
    ]
    names = {}
    exec(blocks(card)[0].replace("hf-hub:USER/NAME", f"local-dir:{out}/export"), names)
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        for model in (*models, names["model"]):
            assert torch.equal(model.eval()(images), ours(images))
    assert models[0].pretrained_cfg["label_names"] == LABELS

    image = Image.open(pictures / "val" / "wren" / "0.jpg")
    torch.testing.assert_close(names["transform"](image), image_transform(SIZE, augment=False)(image))

    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.base_model is None
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "top-1": pytest.approx(metrics.student["top1"], abs=1e-4)
    }
    assert str(tmp_path) not in card.content + json.dumps(config)
    assert "yue2020matching" not in card.text

    # Of the Hub's own weights, where the student started from them.
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    for named, expected in (("pretrained", "timm/test_resnet.r160_in1k"), ("r160_in1k", "timm/test_resnet.r160_in1k")):
        recipe["student"]["weights"] = named
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert exported(out)[0].data.base_model == expected
    recipe["student"]["weights"] = "/home/me/secret/gone.pt"
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card, _ = exported(out)
    assert card.data.base_model is None
    assert "parameters; from `gone.pt` |" in card.text
    assert "| data | birds, 2 classes |" in card.text
    assert "secret" not in card.text


@pytest.mark.parametrize("size", [8, 96, 128, 160, 224, 288, 443, 846])
def test_timm_resizes_to_the_same_pixels(size):
    transform = timm.data.create_transform(**IMAGENET.words(size))
    resized = round(size * 256 / 224)
    assert transform.transforms[0].size in (resized, (resized, resized))


def test_a_network_of_ones_own_in_two_formats(tiny, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "run"
    metrics = fit(tiny("--distillation.method=mgd-amp+kd", "--training.epochs=1"), out, quiet=True)
    exported(out)
    card, config = exported(out, "--format=onnx")
    rebuilt = small_resnet(config["num_classes"], **config["options"])
    assert config["name"] == "matchdistill.models:small_resnet"
    assert (config["input_size"], config["crop_pct"]) == ([3, 16, 16], 1.0)
    ours, _ = load_student(out, trust=True)
    loaded, run = blocks(card)
    names = {"images": torch.randn(3, 3, 16, 16)}
    for code in (loaded, run):
        exec(re.sub(r'"(model\.\w+)"', rf'"{out}/export/\1"', code), names)
    rebuilt.load_state_dict(names["model"].state_dict())
    with torch.no_grad():
        expected = ours(names["images"])
        assert torch.equal(rebuilt.eval()(names["images"]), expected)
    np.testing.assert_allclose(names["outputs"][0], expected, atol=1e-4)
    assert onnxruntime is not None

    assert card.data.tags == ["knowledge-distillation", "matchdistill", "onnx"]
    assert "yue2020matching" in card.text
    (result,) = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert (result.dataset_name, result.metric_value) == ("digits", pytest.approx(metrics.student["top1"], abs=1e-4))
    for role in ("teacher", "student"):
        top1, count = f"{metrics.of(role)['top1']:.2%}", f"{metrics.parameters[role]:,}"
        assert re.search(rf"\| {role} \| {top1} \| .* \| {count} \|", card.text)


def test_a_run_that_was_not_measured(tiny, tmp_path, capsys):
    fit(tiny("--distillation.method=mgd-sm", "--training.epochs=1"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "metrics.json").unlink()
    card, _ = exported(tmp_path / "run")
    assert card.data.eval_results is None
    assert "## Results" not in card.text
    (tmp_path / "run" / "recipe.yaml").unlink()
    shutil.rmtree(tmp_path / "run" / "export")
    assert cli.main(["export", str(tmp_path / "run")]) == 2
    assert "run has no recipe.yaml, which says what was distilled" in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


def test_files_of_others_are_kept(tiny, tmp_path, capsys):
    fit(tiny("--distillation.method=none", "--training.epochs=1"), tmp_path / "run", quiet=True)
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"name": "my project"}')
    arguments = ["export", str(tmp_path / "run"), "--out", str(project / "student.safetensors")]
    assert cli.main(arguments) == 2
    assert f"{project / 'config.json'} exists already and is no export's" in capsys.readouterr().err
    assert [path.name for path in project.iterdir()] == ["config.json"]
    (project / "config.json").unlink()
    for _ in range(2):  # its own it may write again
        assert cli.main(arguments) == 0
    assert sorted(path.name for path in project.iterdir()) == ["config.json", "model_card.md", "student.safetensors"]
    assert 'load_weights(model, "student.safetensors")' in (project / "model_card.md").read_text()


def test_a_detector(small, tmp_path, capsys):
    out = tmp_path / "run"
    metrics = fit(small("--training.epochs=1", "--distillation.method=mgd-amp"), out, quiet=True)
    card, config = exported(out)
    assert card.data.pipeline_tag == "object-detection"
    assert config["category_ids"] == list(CATEGORIES)
    assert config["label_names"] == list(CATEGORIES.values())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["ap50"] == pytest.approx(metrics.student["ap50"], abs=1e-4)
    names = {}
    exec(blocks(card)[0].replace('"model.safetensors"', f'"{out}/export/model.safetensors"'), names)
    ours, _ = load_student(out, trust=True)
    for name, value in ours.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], value)


def test_the_results_of_a_card_say_what_is_known_of_the_student_alone():
    guided, alone = run_of("kd", 0, {"top1": 0.7}, {"top1": 0.9}), run_of("none", 0, {"top1": 0.65})
    table, unknown = _results(guided, None)
    assert "alone" not in table
    assert unknown == "What the student reaches without its teacher is not known."
    table, told = _results(guided, alone)
    assert "| student alone | 65.00% | 1 |" in table
    assert told == "By its teacher: +5.00 top-1; one seed tells no difference; at least 3 would."
    assert len(_results(alone, None)) == 1  # it has no teacher

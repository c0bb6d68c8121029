"""Image classifiers of transformers by name: configs in folders and by type, their weights and their preparation."""

import copy
import json
import pickle
import re

import pytest
import torch

from matchdistill import Predictor, cli
from matchdistill.models import Preparation, build_model
from matchdistill.models.build import find_preparation
from matchdistill.runs.build import build_module
from matchdistill.runs.settings import Model
from matchdistill.runs.train import fit
from matchdistill.tasks import TASKS

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A saved ViT with five labels, and its image processor."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, resample=3)
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_folder_with_its_weights(folder):
    model = build_model(f"transformers:{folder}", weights="pretrained").eval()
    expected = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected(IMAGES).logits)
    assert model.state_dict().keys() == expected.state_dict().keys()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_a_folder_at_random_and_with_other_classes(folder):
    torch.manual_seed(1)
    assert not torch.equal(
        build_model(f"transformers:{folder}").classifier.weight,
        build_model(f"transformers:{folder}", weights="pretrained").classifier.weight,
    )
    model = build_model(f"transformers:{folder}", 3, "pretrained")
    assert model(IMAGES).shape == (2, 3)
    loaded = build_model(f"transformers:{folder}", weights="pretrained")
    assert torch.equal(model.vit.embeddings.cls_token, loaded.vit.embeddings.cls_token)


@pytest.mark.parametrize(("kind", "options"), [("vit", VIT), ("resnet", RESNET)])
def test_a_type_with_options(kind, options):
    model = build_model(f"transformers:{kind}", 3, **options)
    assert model(IMAGES).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "weights", "options", "said"),
    [
        ("transformers:vitt", None, {}, "did you mean 'vit'"),
        ("transformers:bert", None, {}, "no image classifier of the type 'bert'|expected a folder"),
        ("transformers:vit", "pretrained", {}, "has no pretrained weights 'pretrained'"),
        ("transformers:vit", None, {"hidden_sise": 4}, "'hidden_sise'; did you mean 'hidden_size'"),
        ("transformers:vit", None, {"hidden_size": 7}, "cannot be built, it fails with"),
        ("transformers:no/such/folder", None, {}, "expected a folder with a config.json"),
    ],
)
def test_what_cannot_be_built_is_named(name, weights, options, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=said) as raised:
        build_model(name, None, weights, **options)
    assert "\n" not in str(raised.value)


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Net"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        build_model(f"transformers:{folder}")
    assert not (tmp_path / "ran").exists()


def test_the_image_processor_says_how_images_are_prepared(folder):
    found = find_preparation(f"transformers:{folder}", "pretrained", {})
    assert found.fixed
    assert found.values == {
        "mean": [0.4] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "size": 16,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    assert find_preparation("transformers:vit", "pretrained", {}) is None


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {"kind": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
            {"size": 224, "crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            {
                "kind": "CLIPImageProcessor",
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
            },
            {"size": 224, "crop_pct": 0.875, "crop_mode": "center"},
        ),
    ],
)
def test_other_image_processors_see_what_we_see(folder, processor, expected):
    """Held to the image processor itself, on a picture."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms import v2

    options = dict(processor)
    made = getattr(transformers, options.pop("kind"))(**options)
    made.save_pretrained(folder)
    values = find_preparation(f"transformers:{folder}", "pretrained", {}).values
    assert {name: values[name] for name in expected} == expected
    preparation = Preparation.of(values)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((800, 600))  # smooth, as the libraries round in other places
    steps = [*preparation.cut(224), v2.ToTensor(), v2.Normalize(preparation.mean, preparation.std)]
    expected_pixels = made(picture, return_tensors="pt")["pixel_values"][0]
    difference = (v2.Compose(steps)(picture) - expected_pixels).abs().mean()
    assert difference < 0.02


def test_a_run_is_exported_for_transformers(tiny, folder, tmp_path, capsys):
    """The student of a saved config learns from a network of our own, and loads with from_pretrained."""
    recipe = tiny(f"--student.name=transformers:{folder}", "--student.options={}", "--distillation.method=mgd-amp+kd")
    fit(recipe, tmp_path / "run", quiet=True)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hub" / "model.safetensors")]) == 0
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hub").eval()
    assert loaded.config.id2label[3] == "3"
    images, _ = next(iter(recipe.data.val_dataloader()))
    student = build_module(recipe).network()
    from matchdistill.models import load_weights

    load_weights(student, tmp_path / "run" / "student.safetensors")
    with torch.no_grad():
        expected = student.eval()(images)
        torch.testing.assert_close(loaded(images).logits, expected)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["name"] == "transformers:vit"
    folder.rename(tmp_path / "moved")  # the export stands alone
    predictor = Predictor(tmp_path / "hub")
    assert predictor.network.state_dict().keys() == student.state_dict().keys()


def saved_with(folder, names):
    """A saved ResNet whose config names its classes."""
    torch.manual_seed(0)
    named = {"id2label": dict(enumerate(names)), "label2id": {text: number for number, text in enumerate(names)}}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET, **named)).eval()
    model.save_pretrained(folder)
    return model


def built(folder, names, weights="pretrained"):
    model = Model(f"transformers:{folder}", weights=weights)
    return TASKS["classification"].build(model, len(names), names).eval()


@pytest.mark.parametrize("weights", ["pretrained", "the file"])
@pytest.mark.parametrize("names", [["wren", "heron", "grey owl"], ["grey_owl", "Wren", "heron"]])
def test_classes_in_another_order_are_put_into_the_datas(tmp_path, names, weights):
    saved = saved_with(tmp_path, names)
    data = ["grey owl", "heron", "wren"]
    weights = weights if weights == "pretrained" else str(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"has the data's classes in another order .*outputs are put into") as told:
        model = built(tmp_path, data, weights)
    assert len(told) == 1
    order = [[name.lower().replace("_", " ") for name in names].index(name) for name in data]
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), saved(IMAGES).logits[:, order])
    assert list(model.config.id2label.values()) == data
    assert model.config.label2id["wren"] == 2


@pytest.mark.parametrize(
    ("names", "data", "said"),
    [
        (["heron", "wren"], ["heron", "wren"], None),
        (["LABEL_0", "LABEL_1"], ["heron", "wren"], None),
        (["tench, Tinca tinca", "goldfish"], ["n01440764", "n01443537"], None),
        (["wren", "robin"], ["heron", "wren"], r"does not have \(robin\), and the data has others \(heron\).*id2label"),
    ],
)
def test_classes_that_are_left_in_their_order(tmp_path, names, data, said, recwarn):
    saved = saved_with(tmp_path, names)
    model = built(tmp_path, data)
    told = [str(each.message) for each in recwarn if "the data" in str(each.message)]
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0])
    with torch.no_grad():
        assert torch.equal(model(IMAGES), saved(IMAGES).logits)
    assert list(model.config.id2label.values()) == data


def test_weights_of_elsewhere_and_fresh_heads_keep_their_order(tmp_path, recwarn):
    """A config's names are those of its own weights alone."""
    saved_with(tmp_path / "saved", ["wren", "heron"])
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "other.safetensors")
    model = built(tmp_path / "saved", ["heron", "wren"], str(tmp_path / "other.safetensors"))
    (tmp_path / "other.safetensors").rename(tmp_path / "saved" / "model.safetensors")
    plain = build_model(f"transformers:{tmp_path / 'saved'}", weights="pretrained")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert list(built(tmp_path / "saved", ["a", "b", "c"]).config.id2label.values()) == ["a", "b", "c"]
    assert not [each for each in recwarn if "the data" in str(each.message)]


def test_a_teacher_with_other_order_teaches_the_right_classes(tiny, tmp_path):
    names = [str(number) for number in reversed(range(10))]
    saved = saved_with(tmp_path, names)
    given = (f"--teacher.name=transformers:{tmp_path}", "--teacher.options={}", "--teacher.weights=pretrained")
    recipe = tiny(*given, "--distillation.method=mgd-amp+kd")
    with pytest.warns(UserWarning, match="another order"):
        module = build_module(recipe)
    assert recipe.data.class_names == names[::-1]
    with torch.no_grad():
        torch.testing.assert_close(module.teacher.eval()(IMAGES), saved(IMAGES).logits.flip(1))

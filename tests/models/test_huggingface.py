"""Image classifiers of transformers by name: configs in folders and by type, their weights and their preparation."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

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


def test_a_folder_with_its_weights(folder, capfd):
    model = build_model(f"transformers:{folder}", weights="pretrained").eval()
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert transformers.utils.logging.is_progress_bar_enabled()
    expected = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert "Loading weights" in capfd.readouterr().err
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


LEVIT = {"hidden_sizes": [8, 12, 16], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
PERCEIVER = {"num_latents": 4, "d_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 1}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "built"),
    [
        ("deit", VIT, "DeiTForImageClassification"),
        ("levit", {**LEVIT, "image_size": 64}, "LevitForImageClassification"),
        (
            "perceiver",
            {**PERCEIVER, "num_self_attention_heads": 1, "image_size": 16},
            "PerceiverForImageClassificationLearned",
        ),
    ],
)
def test_types_with_several_classes_are_built_as_the_first_of_them(kind, options, built, saved, tmp_path):
    """By type, and from a folder that holds a config alone, which names no class."""
    if saved:
        transformers.AutoConfig.for_model(kind, **options).save_pretrained(tmp_path)
        kind, options = tmp_path, {}
    assert type(build_model(f"transformers:{kind}", 3, **options)).__name__ == built


def test_the_class_that_a_config_names_is_built(tmp_path):
    config = transformers.DeiTConfig(**VIT, num_labels=5)
    first = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    first.save_pretrained(tmp_path)
    second = build_model(f"transformers:{tmp_path}", weights="pretrained").eval()
    with torch.no_grad():
        assert torch.equal(second(IMAGES), first(IMAGES).logits)


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


def smooth(width, height):
    """A picture without edges, as libraries round pixels in other places; its colors differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def side(pixels):
    return {"height": pixels, "width": pixels}


PICTURES = (smooth(60, 120), smooth(33, 20), smooth(400, 300))
CLIP, CONVNEXT = "CLIPImageProcessor", "ConvNextImageProcessor"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (CONVNEXT, {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 0.875, "center")),
        (CONVNEXT, {"size": {"shortest_edge": 384}}, (384, 1, "squash")),
        (CLIP, {"size": {"shortest_edge": 256}}, (224, 0.875, "center")),
        (CLIP, {}, (224, 1, "center")),
        (CLIP, {"size": side(64), "crop_size": side(48)}, (48, 0.75, "squash")),
        ("BitImageProcessor", {}, (224, 1, "center")),
        ("LevitImageProcessor", {}, (224, 0.875, "center")),
        ("PPLCNetImageProcessor", {}, (224, 0.875, "center")),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}, (256, 256 / 288, "center")),
        (
            "MobileViTImageProcessor",
            {"size": {"shortest_edge": 256}, "do_flip_channel_order": False},
            (256, 1, "center"),
        ),
        ("EfficientNetImageProcessor", {"size": side(64)}, (64, 1, "squash")),
        ("EfficientNetImageProcessor", {"size": side(64), "include_top": False}, (64, 1, "squash")),
        (
            "EfficientNetImageProcessor",
            {"size": side(64), "rescale_factor": 1 / 127.5, "rescale_offset": True},
            (64, 1, "squash"),
        ),
        ("ViTImageProcessor", {"size": side(64), "do_rescale": False}, (64, 1, "squash")),
        ("ViTImageProcessor", {"size": side(64), "rescale_factor": 1 / 128}, (64, 1, "squash")),
        ("ViTImageProcessor", {"size": side(64), "do_normalize": False}, (64, 1, "squash")),
        ("ViTImageProcessor", {"size": side(64), "do_rescale": False, "do_normalize": False}, (64, 1, "squash")),
        ("PerceiverImageProcessor", {}, (224, 0.875, "center")),
    ],
)
def test_image_processors_see_what_we_see(folder, kind, options, expected):
    """Held to the image processor itself, on pictures of odd sizes: nothing differs but how pixels are rounded."""
    made = getattr(transformers, kind)(**options)
    made.save_pretrained(folder)
    preparation = Preparation.of(find_preparation(f"transformers:{folder}", "pretrained", {}).values)
    assert (preparation.size, preparation.crop_pct, preparation.crop_mode) == expected
    # Perceiver's crops the picture as it is, to whole pixels, which are few in a small one.
    for picture in PICTURES[2:] if kind == "PerceiverImageProcessor" else PICTURES:
        steps = [*preparation.cut(preparation.size), v2.ToTensor(), v2.Normalize(preparation.mean, preparation.std)]
        theirs = made(picture, return_tensors="pt")["pixel_values"][0].float()
        if kind.startswith("PPLCNet") or getattr(made, "do_flip_channel_order", False):
            theirs = theirs.flip(0)  # the network is turned round instead, see below
        spread = torch.tensor(preparation.std)[:, None, None]
        assert (v2.Compose(steps)(picture) - theirs).mul(
            spread
        ).abs().mean() < 0.012  # a pixel, where halves are rounded


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("MobileViTImageProcessor", {}, "cuts images to 256 px in a way of its own"),  # which has a black border
        ("CLIPImageProcessor", {"do_center_crop": False}, "px of a high and a wide picture, not squares of one size"),
        ("ViTImageProcessor", {"do_resize": False}, "px of a high and a wide picture, not squares of one size"),
        ("ImageGPTImageProcessor", {}, "gives no pixels, it fails with"),
        ("Siglip2ImageProcessor", {}, "gives something else than an image of three channels"),
    ],
)
def test_what_a_preparation_cannot_say_is_refused_by_name(folder, kind, options, said):
    getattr(transformers, kind)(**options).save_pretrained(folder)
    with pytest.raises(ValueError, match=said) as raised:
        find_preparation(f"transformers:{folder}", "pretrained", {})
    assert kind in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_damaged_image_processor_is_refused(folder):
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be built"):
        find_preparation(f"transformers:{folder}", "pretrained", {})


MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "options", "processor"),
    [
        ("mobilevit", MOBILEVIT, transformers.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=side(64))),
        ("pp_lcnet", {"scale": 0.25}, transformers.PPLCNetImageProcessor(resize_short=72, crop_size=side(64))),
    ],
)
def test_a_network_for_bgr_images_takes_rgb(tmp_path, kind, options, processor):
    """Of the channels the other way round it says what transformers says of what the image processor gives."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options, num_labels=5)
    theirs = transformers.AutoModelForImageClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = build_model(f"transformers:{tmp_path}", weights="pretrained").eval().double()
    theirs.double()  # as made, they give logits that are all but zero
    with torch.no_grad():
        for picture in PICTURES[:2]:
            bgr = processor(picture, return_tensors="pt")["pixel_values"].double()
            said = theirs(bgr)
            expected = said.logits if "logits" in said else said.last_hidden_state
            torch.testing.assert_close(ours(bgr.flip(1)), expected, rtol=1e-5, atol=0)
            assert not torch.allclose(ours(bgr), expected, rtol=1e-3, atol=0)


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

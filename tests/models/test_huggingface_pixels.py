"""Networks of transformers that give every pixel a class: by name, with their weights, trained, exported and read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from matchdistill import Predictor, cli
from matchdistill.models import build_model, build_segmenter
from matchdistill.models.build import find_preparation
from matchdistill.models.segmentation import backbone_of
from matchdistill.runs.build import build_module
from matchdistill.runs.settings import Model
from matchdistill.runs.train import fit
from matchdistill.tasks import TASKS
from pixelsets import CLASSES

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
UPERNET = {
    "backbone_config": RESNET,
    "hidden_size": 16,
    "pool_scales": [1, 2],
    "auxiliary_in_channels": 32,
    "auxiliary_channels": 8,
}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def segformer(width):
    return {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [width, 2 * width, 4 * width, 8 * width],
        "num_attention_heads": [1, 1, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
        "decoder_hidden_size": 16,
    }


@pytest.fixture
def folder(tmp_path):
    """A saved SegFormer for three classes, and its image processor."""
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = transformers.SegformerConfig(**segformer(8), id2label=names, label2id={v: k for k, v in names.items()})
    transformers.SegformerForSemanticSegmentation(config).eval().save_pretrained(tmp_path / "segformer")
    transformers.SegformerImageProcessor(image_mean=[0.4] * 3).save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


def test_a_folder_with_its_weights(folder):
    name = f"transformers:{folder}"
    model = build_segmenter(name, weights="pretrained").eval()
    expected = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected(IMAGES).logits)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert build_segmenter(name, 5, "pretrained")(IMAGES).shape == (2, 5, 16, 16)
    torch.manual_seed(1)
    assert not torch.equal(build_segmenter(name).decode_head.classifier.weight, model.decode_head.classifier.weight)
    # The same name as a classifier is one.
    assert build_model(name, 4)(IMAGES).shape == (2, 4)


def test_the_image_processor_says_mean_and_deviation_alone(folder):
    """These networks take images of any size, and the data says how large they are."""
    found = find_preparation(f"transformers:{folder}", "pretrained", {})
    assert not found.fixed
    assert found.values == {"mean": [0.4] * 3, "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}


def test_a_network_for_bgr_images_takes_rgb(tmp_path):
    """MobileViT's image processor gives blue first, and values that are not normalised."""
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.MobileViTConfig(**sizes, image_size=64, num_labels=3)
    theirs = transformers.MobileViTForSemanticSegmentation(config).eval()
    theirs.save_pretrained(tmp_path)
    processor = transformers.MobileViTImageProcessor(do_resize=False, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    name = f"transformers:{tmp_path}"
    assert find_preparation(name, "pretrained", {}).values == {
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "interpolation": "bicubic",
    }
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
    ours, rgb = build_segmenter(name, weights="pretrained").eval(), torch.from_numpy(pixels).movedim(2, 0)[None] / 255
    with torch.no_grad():
        expected = theirs(**processor(Image.fromarray(pixels), return_tensors="pt")).logits
        torch.testing.assert_close(ours(rgb), expected)


@pytest.mark.parametrize(
    ("kind", "options", "size", "backbone"),
    [("segformer", segformer(4), 16, "segformer"), ("upernet", UPERNET, 64, "backbone")],
)
def test_a_type_with_options(kind, options, size, backbone):
    model = build_segmenter(f"transformers:{kind}", 3, **options)
    assert model(IMAGES).shape == (2, 3, size, size)
    assert backbone_of(model) == backbone


def test_networks_without_logits_for_pixels_are_refused():
    for kind in ("mask2former", "vit"):
        said = rf"transformers has no network with logits for every pixel of the type '{kind}'|did you mean"
        with pytest.raises(ValueError, match=said):
            build_segmenter(f"transformers:{kind}", 3)


@pytest.mark.parametrize("teacher", ["folder", "upernet"])
@pytest.mark.parametrize("method", ["mgd-amp", "mgd-amp+kd"])
def test_what_is_distilled(pixelset, folder, teacher, method):
    names = {"folder": (f"transformers:{folder}", "{}"), "upernet": ("transformers:upernet", json.dumps(UPERNET))}
    options = [f"--teacher.name={names[teacher][0]}", f"--teacher.options={names[teacher][1]}"]
    options += ["--student.name=transformers:segformer", f"--student.options={json.dumps(segformer(4))}"]
    module = build_module(pixelset(*options, f"--distillation.method={method}"))
    assert len(module.distiller.positions) == 4


def test_from_a_recipe_to_a_folder_for_the_hub(pixelset, folder, tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "one.png"
    options = [f"--teacher.name=transformers:{folder}", "--teacher.options={}", "--teacher.weights=pretrained"]
    options += ["--student.name=transformers:segformer", f"--student.options={json.dumps(segformer(4))}"]
    # Of smaller images the last map would be a row of two cells.
    recipe = pixelset(*options, "--data.crop=[64, 96]", "--training.epochs=1", "--distillation.method=mgd-amp+kd")
    assert recipe.teacher.prepared.mean == (0.4, 0.4, 0.4)
    fit(recipe, run, quiet=True)
    assert cli.main(["export", str(run), "--push=me/small", "--dry_run"]) == 0, capsys.readouterr().err
    listed = capsys.readouterr().out
    assert all(f"  {name}: " in listed for name in ("config.json", "preprocessor_config.json", "model.safetensors"))
    page = (run / "export" / "README.md").read_text()
    assert 'AutoModelForSemanticSegmentation.from_pretrained("me/small")' in page

    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(run / "export").eval()
    assert list(model.config.id2label.values()) == CLASSES
    processor = transformers.AutoImageProcessor.from_pretrained(run / "export")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    inputs = processor(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    (map_of_theirs,) = processor.post_process_semantic_segmentation(model(**inputs), [(64, 48)])
    for source in (run, run / "export"):
        ours = Predictor(source)
        (found,) = ours(picture)
        assert np.array_equal(found.values, map_of_theirs.numpy())
        with torch.no_grad():
            assert torch.equal(ours.network(inputs["pixel_values"]), logits)


@pytest.mark.parametrize("kind", ["Segformer", "UperNet"])
def test_classes_in_another_order_are_put_into_the_datas(tmp_path, kind):
    """Of all heads, an auxiliary one too."""
    torch.manual_seed(0)
    options = (
        segformer(8) if kind == "Segformer" else {**UPERNET, "backbone_config": transformers.ResNetConfig(**RESNET)}
    )
    names = dict(enumerate(CLASSES[::-1]))
    config = getattr(transformers, f"{kind}Config")(
        **options, id2label=names, label2id={v: k for k, v in names.items()}
    )
    saved = getattr(transformers, f"{kind}ForSemanticSegmentation")(config).eval()
    saved.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has the data's classes in another order"):
        model = TASKS["segmentation"].build(Model(f"transformers:{tmp_path}", weights="pretrained"), 3, CLASSES).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), saved(IMAGES).logits.flip(1))
    if kind == "UperNet":
        assert torch.equal(model.auxiliary_head.classifier.weight, saved.auxiliary_head.classifier.weight.flip(0))
    assert list(model.config.id2label.values()) == CLASSES

"""Detectors of transformers in torchvision's API: held to their image processors, trained as students and as teachers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from matchdistill import Predictor
from matchdistill.models import build_detector, load_weights, save_weights
from matchdistill.models.huggingface_detection import _labels
from matchdistill.runs.build import build_module
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.settings import Model
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from matchdistill.tasks import TASKS
from matchdistill.tasks.detection.card import detector_card

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT = {"min_size": 64, "max_size": 96}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
DETR = {
    **{f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "layers")},
    "backbone_config": {"model_type": "resnet", **RESNET},
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "dropout": 0.0,
    **INPUT,
}
RT_DETR = {
    "backbone_config": {"model_type": "rt_detr_resnet", **RESNET},
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [16, 32, 64],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_denoising": 0,
    **INPUT,
}
DEFORMABLE = {**DETR, "d_model": 32, "num_feature_levels": 3}  # whose group norms have 32 groups
DAB_DETR = {**{name: value for name, value in DETR.items() if name != "d_model"}, "hidden_size": 16}
KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("detr", DETR),
        ("rt_detr", RT_DETR),
        ("rt_detr_v2", {**RT_DETR, "decoder_layers": 2}),
        ("d_fine", {**RT_DETR, "decoder_layers": 2}),
        ("conditional_detr", DETR),
        ("dab-detr", DAB_DETR),
        ("deformable_detr", DEFORMABLE),
    ],
)
BOXES = torch.tensor([[8.0, 4.0, 40.0, 60.0], [50.0, 10.0, 90.0, 30.0]])
LABELS = torch.tensor([3, 1])


def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).movedim(2, 0).float() / 255


@KINDS
def test_it_is_trained_on_what_its_image_processor_makes_of_coco(kind, options):
    """The loss is the model's own for the same picture and annotations, which their processor has prepared."""
    torch.manual_seed(0)
    model = build_detector(f"transformers:{kind}", 3, **options).train()
    image, tensor = picture()
    annotations = [
        {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "category_id": label - 1, "iscrowd": 0}
        for (x0, y0, x1, y1), label in zip(BOXES.tolist(), LABELS.tolist(), strict=True)
    ]
    prepared = model.processor(
        images=image,
        annotations={"image_id": 0, "annotations": annotations},
        do_resize=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        torch.manual_seed(0)
        found = model([tensor], [{"boxes": BOXES, "labels": LABELS}])
        torch.manual_seed(0)
        expected = model.model(pixel_values=prepared["pixel_values"], labels=prepared["labels"]).loss
    torch.testing.assert_close(found["detr"], expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_it_finds_what_its_image_processor_says(kind, options):
    model = build_detector(f"transformers:{kind}", 3, **options).eval()
    image, tensor = picture()
    with torch.no_grad():
        (found,) = model([tensor])
        inputs = model.processor(images=image, do_resize=False, return_tensors="pt")
        output = model.model(**inputs)
        (expected,) = model.processor.post_process_object_detection(output, 0.0, [(64, 96)])
    assert len(found["boxes"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
    assert torch.equal(found["labels"], expected["labels"] + 1)
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize("size", [(120, 60), (20, 33), (48, 64)])
@pytest.mark.parametrize(
    ("kind", "options", "size_of"),
    [
        ("rt_detr", RT_DETR, {"height": 64, "width": 64}),
        ("rt_detr", RT_DETR, {"height": 64, "width": 96}),
        ("detr", DETR, {"shortest_edge": 64, "longest_edge": 96}),
    ],
)
def test_images_become_as_large_as_its_image_processor_makes_them(kind, options, size_of, size, tmp_path):
    """Held to the image processor on smooth pictures of many ratios, with the boxes that are learned there."""
    own = {name: value for name, value in options.items() if name not in INPUT}
    torch.manual_seed(0)
    model = build_detector(f"transformers:{kind}", 3, **own).eval()
    model.model.save_pretrained(tmp_path)
    type(model.processor)(size=size_of).save_pretrained(tmp_path)
    model = build_detector(f"transformers:{tmp_path}", 3, "pretrained").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255
    inputs = model.processor(images=image, return_tensors="pt")
    batch, _ = model.transform([tensor])
    height, width = batch.image_sizes[0]
    theirs = inputs["pixel_values"][0]
    assert max(abs(height - theirs.shape[1]), abs(width - theirs.shape[2])) <= 1  # a pixel, where sides are rounded
    if kind == "rt_detr":
        assert batch.tensors.shape == inputs["pixel_values"].shape
    seen = [
        each[:, : min(height, theirs.shape[1]), : min(width, theirs.shape[2])] for each in (batch.tensors[0], theirs)
    ]
    assert (seen[0] - seen[1]).abs().mean() < 0.03
    boxes = torch.tensor([[2.0, 3.0, 20.0, 15.0]])
    found = _labels(model.transform([tensor], [{"boxes": boxes, "labels": torch.tensor([3])}])[1][0], (height, width))
    annotation = {"bbox": [2, 3, 18, 12], "area": 216, "category_id": 2, "iscrowd": 0}
    told = model.processor(images=image, annotations={"image_id": 0, "annotations": [annotation]}, return_tensors="pt")
    torch.testing.assert_close(found["boxes"], told["labels"][0]["boxes"], rtol=0.02, atol=0)
    assert torch.equal(found["class_labels"], told["labels"][0]["class_labels"])


def test_sizes_that_are_given_keep_the_ratio():
    model = build_detector("transformers:rt_detr", 3, **RT_DETR)
    assert model.transform([torch.zeros(3, 60, 120)])[0].image_sizes == [(48, 96)]
    own = {name: value for name, value in RT_DETR.items() if name not in INPUT}
    model = build_detector("transformers:rt_detr", 3, **own)
    assert model.transform([torch.zeros(3, 60, 120)])[0].image_sizes == [(640, 640)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_resize": False}, r"\(DetrImageProcessor\) leaves images as large as they are: .* min_size and max_size"),
        ({"size": {"max_height": 64, "max_width": 64}}, "resizes images to {'max_height': 64, 'max_width': 64}: say"),
        ({"pad_size": {"height": 96, "width": 96}}, "pads images to one size: say"),
    ],
)
def test_what_has_no_words_in_torchvision_is_refused_by_name(tmp_path, options, said):
    own = {name: value for name, value in DETR.items() if name not in INPUT}
    build_detector("transformers:detr", 3, **own).model.save_pretrained(tmp_path)
    transformers.DetrImageProcessor(**options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        build_detector(f"transformers:{tmp_path}", 3, "pretrained")
    assert build_detector(f"transformers:{tmp_path}", 3, "pretrained", **INPUT)


def test_values_are_what_the_image_processor_makes_of_them(tmp_path):
    build_detector("transformers:detr", 3, **DETR).model.save_pretrained(tmp_path)
    processor = transformers.DetrImageProcessor(do_rescale=False)
    processor.save_pretrained(tmp_path)
    model = build_detector(f"transformers:{tmp_path}", 3, "pretrained", **INPUT)
    image, tensor = picture()
    expected = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.transform([tensor])[0].tensors, expected, rtol=1e-4, atol=1e-3)


def test_padding_is_no_part_of_an_image():
    """An image in a batch with a larger one is seen as alone."""
    torch.manual_seed(0)
    model = build_detector("transformers:detr", 3, **DETR).eval()
    small, large = torch.rand(3, 64, 64), torch.rand(3, 64, 96)
    with torch.no_grad():
        alone, beside = model([small])[0], model([small, large])[0]
    for name in ("boxes", "scores"):
        torch.testing.assert_close(alone[name], beside[name], rtol=1e-2, atol=1e-1)


def test_what_is_no_such_detector_is_refused():
    with pytest.raises(ValueError, match=r"has no backbone of maps at model\.backbone\.model"):
        build_detector(
            "transformers:yolos",
            3,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
            image_size=[64, 64],
        )
    with pytest.raises(ValueError, match=r"transformers has no detector of the type 'vit'|expected a folder"):
        build_detector("transformers:vit", 3)


def test_a_folder_with_its_weights(tmp_path):
    torch.manual_seed(0)
    first = build_detector("transformers:detr", 3, **DETR).eval()
    first.model.save_pretrained(tmp_path)
    transformers.DetrImageProcessor(image_mean=[0.4] * 3).save_pretrained(tmp_path)
    second = build_detector(f"transformers:{tmp_path}", 3, "pretrained", **INPUT).eval()
    assert second.transform.image_mean == [0.4] * 3
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("students", ["detr", "torchvision"])
def test_a_run(small, tmp_path, students):
    """DETR from RT-DETR, and a detector of torchvision from DETR: positions, precisions, and the student read back."""
    names = {
        "teacher": ("rt_detr", RT_DETR | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        "student": ("detr", DETR),
    }
    if students == "torchvision":
        names = {"teacher": names["student"]}
    given = [f"--{role}.name=transformers:{kind}" for role, (kind, _) in names.items()]
    given += [f"--{role}.options={json.dumps(options)}" for role, (_, options) in names.items()]
    recipe = small(*given, "--teacher.weights=null", "--training.epochs=1", "--distillation.norm=batch")
    assert len(build_module(recipe).distiller.positions) == 4
    fit(recipe, tmp_path / "run", quiet=True)
    assert "ap" in read_metrics(tmp_path / "run").student
    if students == "detr":
        student, _ = load_student(tmp_path / "run")
        picture()[0].save(tmp_path / "one.png")
        (found,) = Predictor(tmp_path / "run")(tmp_path / "one.png")
        with torch.no_grad():
            (own,) = student([picture()[1]])
        assert len(found.scores) == len(own["scores"])
        student.model.save_pretrained(tmp_path / "saved")
        loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
        assert all(torch.equal(value, student.model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_networks_that_prepare_images_in_other_ways_are_refused(small):
    """RT-DETR takes pixels from 0 to 1, unless it is told otherwise."""
    with pytest.raises(ValueError, match="the teacher's image_mean is"):
        build_module(
            small(
                "--teacher.name=transformers:rt_detr",
                f"--teacher.options={json.dumps(RT_DETR)}",
                "--teacher.weights=null",
            )
        )


@KINDS
def test_classes_in_another_order_are_put_into_the_datas(tmp_path, kind, options):
    """Of DETR the row of no object stays the last one."""
    torch.manual_seed(0)
    saved = build_detector(f"transformers:{kind}", 3, **options).eval()
    names = ["cross", "disc", "bar"]
    saved.model.config.id2label = dict(enumerate(names))
    saved.model.save_pretrained(tmp_path)
    named = Model(f"transformers:{tmp_path}", weights="pretrained", options={**INPUT, "image_std": [1.0] * 3})
    with pytest.warns(UserWarning, match="has the data's classes in another order"):
        model = TASKS["detection"].build(named, 3, ["bar", "cross", "disc"]).eval()
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model.model(pixels), saved.model(pixels)
    order = [2, 0, 1, *range(3, expected.logits.shape[-1])]
    torch.testing.assert_close(found.logits, expected.logits[..., order])
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("given", [{}, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, {"fixed_size": [96, 64]}])
@KINDS
def test_an_export_is_a_folder_for_transformers(tmp_path, kind, options, given):
    torch.manual_seed(0)
    student = build_detector(f"transformers:{kind}", 3, **{**options, **given}).eval()
    names = ["cross", "disc", "bar"]
    described = {"name": f"transformers:{tmp_path}", "options": {}, "category_ids": [3, 7, 11], "class_names": names}
    card = detector_card(student, described)
    (tmp_path / "config.json").write_text(json.dumps(card.config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(card.beside["preprocessor_config.json"]))
    save_weights(student, tmp_path / "model.safetensors")

    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(loaded.config.id2label.values()) == names
    image, tensor = picture()
    inputs = processor(images=image, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], student.transform([tensor])[0].tensors)
    with torch.no_grad():
        (found,) = processor.post_process_object_detection(loaded(**inputs), 0.0, [(64, 96)])
        (own,) = student([tensor])
    torch.testing.assert_close(found["scores"], own["scores"], rtol=1e-4, atol=1e-5)
    # Scores that are all but equal may come in another order.
    rows = [torch.cat([each["boxes"], 1000.0 * each["labels"][:, None]], 1) for each in (found, own)]
    rows[0][:, 4] += 1000.0  # what transformers counts from 0
    apart = torch.cdist(*rows)
    assert max(apart.min(0).values.max(), apart.min(1).values.max()) < 0.02
    # By its name in config.json it is built again, and files with the names of before are read too.
    again = build_detector(card.config["name"], 3, **card.config["options"]).eval()
    torch.save(student.state_dict(), tmp_path / "before.pt")
    for file in ("model.safetensors", "before.pt"):
        load_weights(again, tmp_path / file)
        with torch.no_grad():
            assert torch.equal(again([tensor])[0]["boxes"], own["boxes"])

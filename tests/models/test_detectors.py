import re

import pytest
import torch
from torch import nn

from detectors import DETECTOR, FEW, SmallBackbone
from matchdistill.models import build_detector, detector, save_weights
from matchdistill.models.detection import _spans
from matchdistill.runs.recipe import load_recipe
from matchdistill.tasks.detection.checks import check_detector
from matchdistill.tasks.detection.parts import padded_batches, pixel_mask

IMAGES = [torch.rand(3, 40, 60), torch.rand(3, 64, 48)]
TARGETS = [
    {
        "boxes": torch.tensor([[4.0, 5.0, 30.0, 35.0]]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 40, 60).byte(),
    },
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 48).byte()},
]
OUTPUTS = {"boxes", "labels", "scores"}


def small(**options):
    return detector(3, **{**DETECTOR, **options})


@pytest.mark.parametrize(
    ("architecture", "losses"),
    [
        ("retinanet", {"classification", "bbox_regression"}),
        ("fcos", {"classification", "bbox_regression", "bbox_ctrness"}),
        ("faster_rcnn", {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}),
        ("mask_rcnn", {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"}),
    ],
)
def test_architectures_take_images_with_and_without_boxes(architecture, losses):
    model = small(architecture=architecture, pyramid_channels=32, **(FEW if "rcnn" in architecture else {}))
    found = model(IMAGES, TARGETS)  # label 3 is the last of 3 classes beside the background
    assert found.keys() == losses
    assert all(loss.isfinite() for loss in found.values())
    sum(found.values()).backward()
    unused = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert unused == []
    with torch.no_grad():
        output = model.eval()(IMAGES)
    assert output[0].keys() == OUTPUTS | ({"masks"} if architecture == "mask_rcnn" else set())


@pytest.mark.parametrize("architecture", ["retinanet", "faster_rcnn"])
def test_anchors(architecture):
    model = small(architecture=architecture, anchor_size=16)
    generator = model.anchor_generator if architecture == "retinanet" else model.rpn.anchor_generator
    assert [sizes[0] for sizes in generator.sizes] == [16, 32, 64, 128, 256]
    if architecture == "retinanet":
        assert generator.sizes[1] == (32, 40, 50)  # by the third of an octave, whole


def test_heads_are_as_wide_as_the_pyramid():
    with torch.device("meta"):
        torchvisions = build_detector("torchvision:maskrcnn_resnet50_fpn", 3).roi_heads.state_dict()
    shapes = {name: tuple(value.shape) for name, value in torchvisions.items()}
    own = small(architecture="mask_rcnn", pyramid_channels=256).roi_heads.state_dict()
    assert {name: tuple(value.shape) for name, value in own.items()} == shapes
    narrow = small(architecture="mask_rcnn", pyramid_channels=64).roi_heads.state_dict()
    assert narrow["box_head.fc6.weight"].shape == (256, 64 * 7**2)
    assert narrow["box_predictor.cls_score.weight"].shape == (4, 256)
    assert narrow["mask_head.3.0.weight"].shape == (64, 64, 3, 3)
    assert narrow["mask_predictor.mask_fcn_logits.weight"].shape == (4, 64, 1, 1)


@pytest.mark.parametrize("architecture", ["retinanet", "mask_rcnn"])
def test_norms_of_the_pyramid(architecture):
    def norms(kind, part):
        found = small(architecture=architecture, pyramid_norm=kind).get_submodule(part).modules()
        return sum(isinstance(module, nn.GroupNorm) for module in found)

    levels = 3 if architecture == "retinanet" else 4
    assert (norms("none", ""), norms("group", "backbone.fpn")) == (0, 2 * levels)
    assert norms("group", "") - 2 * levels == (8 if architecture == "retinanet" else 0)


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        (0, set()),
        (1, {"conv1"}),
        (2, {"conv1", "layer1"}),
        (3, {"conv1", "layer1", "layer2"}),
        (5, {"conv1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
@pytest.mark.parametrize("norms", ["all", "last"])
def test_frozen_stages_keep_weights_and_statistics(frozen, names, norms):
    model = small(frozen_stages=frozen, trained_norms=norms)
    body = model.backbone.body
    before = {name: value.clone() for name, value in body.state_dict().items()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    sum(model(IMAGES, TARGETS).values()).backward()
    optimizer.step()
    changed = {
        name.partition(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])
    }
    # The norm beside conv1 belongs to the stem.
    assert changed == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"} - names - (
        {"bn1"} if frozen or norms == "last" else set()
    )


@pytest.mark.parametrize(
    ("backbone", "last"),
    [
        ("detectors:SmallBackbone", {"layer1.1", "layer2.0", "layer3.0", "layer4.0"}),
        ("torchvision:resnet18", {"layer1.1", "layer2.1", "layer3.1", "layer4.1"}),
        ("timm:test_resnet", {"layer1.0", "layer2.0", "layer3.0", "layer4.0"}),
    ],
)
def test_norms_that_are_trained(backbone, last):
    body = small(backbone=backbone, trained_norms="last", frozen_stages=0).backbone.body
    trained = {name for name, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0].removesuffix(".shortcut").removesuffix(".downsample") for name in trained} == last
    assert not [m for m in small(trained_norms="none").backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]


def test_norms_that_are_trained_of_a_stage_that_ends_in_one_block():
    body = small(backbone="torchvision:mobilenet_v2", trained_norms="last", frozen_stages=1).backbone.body
    trained = {name.partition(".")[0] for name, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert trained == {
        "3",
        "6",
        "13",
        "18",
    }  # the last is no block of several convolutions, but a convolution and its norm


def test_frozen_norms_compute_what_they_did(tmp_path):
    torch.manual_seed(0)
    classifier = SmallBackbone()
    for _ in range(3):
        classifier(torch.randn(4, 3, 64, 64))
    maps = {}
    for stage in (1, 2, 3, 4):
        classifier.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _, args, out, stage=stage: maps.update({stage: out})
        )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        classifier.eval()(images)
    save_weights(classifier, tmp_path / "classifier.safetensors")
    options = {"backbone_weights": str(tmp_path / "classifier.safetensors"), "trained_norms": "none"}
    body = small(**options).backbone.body
    with torch.no_grad():
        found = body.train()(images)
    for stage, level in zip((1, 2, 3, 4), found.values(), strict=True):
        torch.testing.assert_close(level, maps[stage])


def test_weights_of_a_backbone(tmp_path):
    torch.manual_seed(0)
    classifier = SmallBackbone(num_classes=7)
    path = tmp_path / "classifier.safetensors"
    save_weights(classifier, path)
    body = small(backbone_weights=str(path), trained_norms="all").backbone.body
    own = body.state_dict()
    assert torch.equal(own["layer3.0.conv1.weight"], classifier.layer3[0].conv1.weight)
    # A whole detector's weights take the place of the backbone's, whose file need not be there.
    save_weights(small(), tmp_path / "detector.safetensors")
    options = {**DETECTOR, "backbone_weights": str(tmp_path / "absent.pth")}
    model = build_detector("matchdistill.models:detector", 3, tmp_path / "detector.safetensors", **options)
    saved = build_detector("matchdistill.models:detector", 3, tmp_path / "detector.safetensors", **DETECTOR)
    assert torch.equal(model.backbone.body.layer1[0].conv1.weight, saved.backbone.body.layer1[0].conv1.weight)


def test_a_head_that_no_backbone_has_is_not_named(tmp_path, caplog):
    import timm

    path = tmp_path / "classifier.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)  # with a convolution in its head
    small(backbone="timm:test_efficientnet", backbone_weights=str(path), trained_norms="all")
    assert not caplog.records


def test_weights_of_timms_backbones_are_checked(tmp_path):
    import timm

    path = tmp_path / "classifier.pth"
    classifier = timm.create_model("test_resnet", num_classes=4)
    torch.save(classifier.state_dict(), path)
    body = small(backbone="timm:test_resnet", backbone_weights=str(path), trained_norms="all").backbone.body
    assert torch.equal(body.layer2[0].conv1.weight, classifier.layer2[0].conv1.weight)
    torch.save(SmallBackbone().state_dict(), path)
    with pytest.raises(ValueError, match="does not fit"):
        small(backbone="timm:test_resnet", backbone_weights=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "retinanett"}, "did you mean 'retinanet'"),
        ({"frozen_stages": 6}, r"frozen_stages=6: expected 0 \(none\) to 5"),
        ({"pyramid_norm": "batch"}, "pyramid_norm='batch': expected 'none' or 'group'"),
        ({"trained_norms": "some"}, "trained_norms='some': expected 'all', 'last' or 'none'"),
        (
            {"backbone": "timm:vit_tiny_patch16_224"},
            "has maps of the strides 16, 16, 16: a pyramid needs 4, 8, 16 and 32",
        ),
        ({"backbone": "torchvision:resnet19"}, "torchvision has no such model"),
        ({"backbone": "matchdistill.models:small_resnet"}, "has maps of the strides 1, 2, 4: a pyramid needs"),
    ],
)
def test_values_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_torchvisions_own_need_no_download():
    with torch.device("meta"):
        model = build_detector("torchvision:fasterrcnn_resnet50_fpn", 3)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    with pytest.raises(ValueError, match=r"no such detector; did you mean '(retinanet_resnet50_fpn|.*retinanet)"):
        build_detector("torchvision:retinanet_resnet50_fpm", 3)


def test_pixels_of_images():
    model = small(min_size=64, max_size=200).eval()
    with torch.no_grad(), padded_batches(model) as batches:
        model(IMAGES)
    (batch,) = batches
    mask = pixel_mask(batch)
    assert batch.image_sizes == [(64, 96), (85, 64)]
    assert mask.shape == (2, 96, 96)
    assert mask.dtype == torch.bool
    for keep, (height, width) in zip(mask, batch.image_sizes, strict=True):
        assert keep[:height, :width].all()
        assert keep.sum() == height * width
    with torch.no_grad(), padded_batches(model) as batches:
        model([torch.rand(3, 64, 96)])
    assert pixel_mask(batches[0]) is None
    assert not model.transform._forward_hooks


TORCHVISIONS = [
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    pytest.param("ssd300_vgg16", marks=pytest.mark.slow),
    "ssdlite320_mobilenet_v3_large",
]


@pytest.fixture
def quick(monkeypatch):
    """torchvision's detectors with one block a stage of their ResNets, and no time spent on random numbers."""
    from torchvision.models import resnet

    for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "normal_", "trunc_normal_", "uniform_"):
        monkeypatch.setattr(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor.detach().fill_(torch.rand(())))

    def plain(**options):
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **{"norm_layer": options.get("norm_layer")})

    for module in ("retinanet", "fcos", "mask_rcnn"):
        monkeypatch.setattr(f"torchvision.models.detection.{module}.resnet50", plain)


def heads(model, other):
    """The tensors of a model that have another shape in the other."""
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return {name: value for name, value in model.state_dict().items() if value.shape != shapes[name]}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_weights_for_other_classes(name, quick, tmp_path):
    source = build_detector(f"torchvision:{name}", 6)
    save_weights(source, tmp_path / "six.safetensors")
    with pytest.raises(ValueError, match=r"for other classes, the model has its own \(.*keep its own, untrained head"):
        build_detector(f"torchvision:{name}", 3, tmp_path / "six.safetensors")
    torch.manual_seed(1)
    model = build_detector(f"torchvision:{name}", 3, tmp_path / "six.safetensors", fresh_head=True)
    before = source.state_dict()
    own = heads(model, source)
    assert {"fasterrcnn": 4, "maskrcnn": 6, "ssd300": 12, "ssdlite320": 12}.get(name.partition("_")[0], 2) == len(own)
    assert all(any(part in key for part in ("predictor", "cls_logits", "classification_head")) for key in own)
    for key, value in model.state_dict().items():
        assert key in own or torch.equal(value, before[key]), key
    with pytest.raises(ValueError, match="does not fit"):  # of another architecture
        build_detector("matchdistill.models:detector", 3, tmp_path / "six.safetensors", fresh_head=True, **DETECTOR)


@pytest.mark.parametrize("of_library", [False, True])
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_weights_for_cocos_labels(name, of_library, quick, tmp_path, monkeypatch):
    torch.manual_seed(0)
    whole = build_detector(f"torchvision:{name}", 90)
    for value in heads(whole, build_detector(f"torchvision:{name}", 3)).values():
        value.normal_()  # as if trained
    weights = "DEFAULT" if of_library else str(tmp_path / "coco.safetensors")
    save_weights(whole, tmp_path / "coco.safetensors")
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: whole.state_dict())
    # Not in the order of COCO's ids, 17, 88 and 1.
    model = build_detector(f"torchvision:{name}", 3, weights, class_names=["cat", "teddy bear", "person"]).eval()
    seen = {}
    for role, network in (("own", model), ("whole", whole.eval())):
        features = [torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) for size in sizes(network)]
        with torch.no_grad():
            seen[role] = outputs(network, features)
    columns = [0, 17, 88, 1]
    assert len(seen["own"]) == len(seen["whole"]) > 0
    for own, all_of_them in zip(seen["own"], seen["whole"], strict=True):
        torch.testing.assert_close(own, all_of_them[:, columns])
    # With a class that COCO does not have, the head is a fresh one of the library's, and a file is refused.
    if of_library:
        other = build_detector(f"torchvision:{name}", 2, weights, class_names=["cat", "shoe"]).eval()
        assert len(outputs(other, features)[0][0]) == 3
    else:
        with pytest.raises(ValueError, match="for other classes"):
            build_detector(f"torchvision:{name}", 2, weights, class_names=["cat", "shoe"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "name"), [("retinanet", "retinanet_resnet50_fpn"), ("mask_rcnn", "maskrcnn_resnet50_fpn")]
)
def test_weights_of_torchvision_fit_the_teachers_of_the_recipes(architecture, name, tmp_path):
    whole = build_detector(f"torchvision:{name}", 90)
    # Published with frozen norms, which count nothing, and under the names of that time.
    state = {name_of_2021(key): value for key, value in whole.state_dict().items() if "num_batches" not in key}
    assert len(set(state) - set(whole.state_dict())) == {"retinanet": 28, "mask_rcnn": 26}[architecture]
    torch.save(state, tmp_path / "coco.pth")
    options = load_recipe(f"coco_{architecture.replace('_', '')}_r50_r18_1x").teacher.options
    model = build_detector(
        "matchdistill.models:detector", 2, tmp_path / "coco.pth", class_names=["cat", "person"], **options
    )
    assert torch.equal(model.backbone.body.layer4[2].conv3.weight, whole.backbone.body.layer4[2].conv3.weight)
    assert torch.equal(model.backbone.fpn.inner_blocks[1][0].weight, whole.backbone.fpn.inner_blocks[1][0].weight)
    if architecture == "retinanet":
        convs = [network.head.regression_head.conv[3][0].weight for network in (model, whole)]
    else:
        convs = [network.roi_heads.mask_head[2][0].weight for network in (model, whole)]
    assert torch.equal(*convs)
    assert len(heads(model, whole)) == {"retinanet": 2, "mask_rcnn": 6}[architecture]


def name_of_2021(name):
    """Of an entry in the state dicts of torchvision's detectors before their convolutions got activations of their own."""
    name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
    name = re.sub(r"(_head\.conv\.)(\d)\.0\.", lambda found: f"{found[1]}{2 * int(found[2])}.", name)
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    return re.sub(r"(mask_head\.)(\d)\.0\.", lambda found: f"{found[1]}mask_fcn{int(found[2]) + 1}.", name)


def sizes(model):
    """Of what a detector's last layers take."""
    if hasattr(model, "roi_heads"):
        return [(1024,)]
    if hasattr(model.head.classification_head, "cls_logits"):
        return [(256, 4, 5)]
    widths = [next(layer.parameters()).shape for layer in model.head.classification_head.module_list]
    return [(shape[1] if shape[1] > 1 else shape[0], 4, 5) for shape in widths]


def outputs(model, features):
    """What the last layers give, (N, labels, ...), for features without the layers before them."""
    if hasattr(model, "roi_heads"):
        scores, boxes = model.roi_heads.box_predictor(features[0])
        found = [scores, boxes.unflatten(1, (-1, 4))]
        predictor = getattr(model.roi_heads, "mask_predictor", None)
        return [*found, *([predictor(torch.ones(1, 256, 4, 4))] if predictor else [])]
    head = model.head.classification_head
    return [head(features).movedim(-1, 1)]  # (N, positions and anchors, labels)


class Counting(nn.Module):
    """Counts the images that it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        self.seen += len(images)
        return images


def test_looking_at_a_detector_leaves_it_as_it_was():
    model = small(frozen_stages=1)
    counting = model.backbone.body.counting = Counting()
    model.backbone.body.register_forward_pre_hook(lambda body, args: (body.counting(*args),))
    model.train()
    model.backbone.fpn.eval()
    modes, drawn = [module.training for module in model.modules()], torch.get_rng_state()
    check_detector(model, False, "student")
    spans = _spans(model.backbone.body)
    assert counting.seen == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(drawn)
    assert set(spans) <= set(model.backbone.body.modules())
    assert spans

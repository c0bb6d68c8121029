"""What trains a network that gives every pixel a class, against slow loops."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oracles
from detectors import as_found
from matchdistill.data.pixels import IGNORED, PADDED
from matchdistill.distiller import MatchingDistiller
from matchdistill.models import build_segmenter, segmenter
from matchdistill.models.preparation import IMAGENET
from matchdistill.runs.build import build_module
from matchdistill.tasks import TASKS
from matchdistill.tasks.segmentation.losses import dice_loss, pixel_cross_entropy, pixel_kd_loss
from matchdistill.tasks.segmentation.module import alone, counted, pixel_measures
from matchdistill.tasks.segmentation.outputs import outputs_in, segment
from pixelsets import CLASSES, TAPS, SmallSegmenter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log", "ignore:.*LeafSpec"),
]


def a_batch(classes=4, size=(6, 7)):
    """Logits of three images, of a second network too, and labels with ignored pixels and padding."""
    chance = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 3, classes, *size, generator=chance)
    labels = torch.randint(IGNORED, classes, (3, *size), generator=chance)
    labels[:, -2:] = PADDED
    return logits, others, labels


def pixels(logits, labels):
    """The logits (classes,) and label of every pixel that counts, one by one."""
    for image, row, column in (labels >= 0).nonzero().tolist():
        yield logits[image, :, row, column].double(), int(labels[image, row, column])


def test_cross_entropy_is_the_mean_over_the_pixels_that_count():
    logits, _, labels = a_batch()
    each = [-values.log_softmax(0)[label] for values, label in pixels(logits, labels)]
    assert pixel_cross_entropy(logits, labels).item() == pytest.approx(float(sum(each)) / len(each), rel=1e-5)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    known = F.cross_entropy(logits, labels.clamp_min(-1), weights, ignore_index=-1, label_smoothing=0.1)
    assert pixel_cross_entropy(logits, labels, weights, 0.1).item() == pytest.approx(known.item(), rel=1e-5)


def test_dice_is_that_of_the_classes_that_are_there():
    logits, _, labels = a_batch(classes=5)
    labels[labels == 4] = 3
    both, found, true = torch.zeros(3, 5, dtype=torch.float64)
    for values, label in pixels(logits, labels):
        shares = values.softmax(0)
        both[label] += shares[label]
        found += shares
        true[label] += 1
    expected = [1 - 2 * both[label] / (found[label] + true[label]) for label in range(4)]
    assert dice_loss(logits, labels).item() == pytest.approx(float(sum(expected)) / 4, rel=1e-5)


def test_kd_is_the_mean_over_the_pixels_that_count():
    logits, others, labels = a_batch()
    each = [
        2.5**2 * float((taught / 2.5).softmax(0) @ ((taught / 2.5).log_softmax(0) - (values / 2.5).log_softmax(0)))
        for (values, _), (taught, _) in zip(pixels(logits, labels), pixels(others, labels), strict=True)
    ]
    assert pixel_kd_loss(logits, others, labels, 2.5).item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_what_does_not_count_has_no_gradient_and_may_be_anything():
    logits, others, labels = a_batch()
    bad = (labels < 0)[:, None].expand_as(logits)
    logits = logits.masked_fill(bad, 1e4).requires_grad_()
    others = others.masked_fill(bad, -1e4)
    total = pixel_cross_entropy(logits, labels) + dice_loss(logits, labels) + pixel_kd_loss(logits, others, labels, 1.0)
    total.backward()
    assert math.isfinite(total.item())
    assert (logits.grad[bad] == 0).all()
    assert (logits.grad[~bad] != 0).any()
    for none in (torch.full_like(labels, IGNORED), torch.full_like(labels, PADDED)):
        losses = pixel_cross_entropy(logits, none), dice_loss(logits, none), pixel_kd_loss(logits, others, none, 1.0)
        assert [loss.item() for loss in losses] == [0, 0, 0]
        assert all(loss.requires_grad for loss in losses)


def test_metrics():
    """Against counting pixel by pixel; a class that neither has is left out of the mean."""
    chance = torch.Generator().manual_seed(0)
    measure = pixel_measures(5)
    found = torch.randint(0, 4, (2, 3, 8, 8), generator=chance)
    labels = torch.randint(IGNORED, 3, (2, 3, 8, 8), generator=chance)
    for each in zip(found, labels, strict=True):
        measure.update(*each)
    computed = measure.compute()
    counted = [(a, b) for a, b in zip(found.flatten().tolist(), labels.flatten().tolist(), strict=True) if b >= 0]
    expected = [sum(a == b == label for a, b in counted) / sum(label in pair for pair in counted) for label in range(4)]
    assert computed["each"].tolist() == pytest.approx([*expected, -1])
    assert computed["miou"].item() == pytest.approx(sum(expected) / 4)
    assert computed["pixel_accuracy"].item() == pytest.approx(sum(a == b for a, b in counted) / len(counted))


def ready(pixelset, *arguments):
    """The module of a recipe with networks as if trained, after a refresh, and a batch with padding."""
    recipe = pixelset("--data.flip=false", "--data.scale=[0.8,0.8]", "--data.batch_size=8", *arguments)
    module = build_module(recipe)
    torch.manual_seed(0)
    for network in (module.network(), module.teacher):
        if network is not None:
            as_found(network)
    if isinstance(module.distiller, MatchingDistiller):
        module.refresh(recipe.data.refresh_dataloader(8, 0))
    images, labels = next(iter(recipe.data.train_dataloader()))
    assert {PADDED, IGNORED, 0, 1, 2} == set(labels.unique().tolist())
    return module.train(), (images, labels)


def tapped(backbone, images):
    """What the taps of a backbone take, by plain hooks."""
    taken = {}
    handles = [
        backbone.get_submodule(tap.partition(":")[0]).register_forward_pre_hook(
            lambda _, args, tap=tap: taken.update({tap: args[0].detach().clone()})
        )
        for tap in TAPS
    ]
    with torch.no_grad():
        backbone(images)
    for handle in handles:
        handle.remove()
    return [taken[tap] for tap in TAPS]


@pytest.mark.parametrize("method", ["mgd-amp", "mgd-amp+kd"])
def test_a_step_is_the_loss_on_labels_and_the_partial_loss_where_pixels_count(pixelset, method):
    """With kd the distiller sees whole networks, whose teacher then runs once; the positions are the same."""
    module, (images, labels) = ready(
        pixelset, f"--distillation.method={method}", "--training.loss=ce+dice", "--student.options.aux=true"
    )
    student, teacher = copy.deepcopy(module.network()), copy.deepcopy(module.teacher)
    passes = []
    module.teacher.backbone.register_forward_hook(lambda *_: passes.append(1))
    losses = module.batch_losses((images, labels))
    assert len(passes) == 1
    output = student(images)
    assert losses["task"].item() == pytest.approx(
        (pixel_cross_entropy(output["out"], labels) + dice_loss(output["out"], labels)).item(), rel=1e-4
    )
    assert losses["aux"].item() == pytest.approx(0.4 * pixel_cross_entropy(output["aux"], labels).item(), rel=1e-4)
    assert ("kd" in losses) == method.endswith("kd")
    if "kd" in losses:
        taught = teacher(images)["out"]
        kd = pixel_kd_loss(output["out"], taught, labels, module.distillation.kd_temperature)
        assert losses["kd"].item() == pytest.approx(module.distillation.weight("kd") * kd.item(), rel=1e-4)
    paths = [str(position.student) for position in module.distiller.positions]
    prefix = "backbone." if method.endswith("kd") else ""
    assert paths == [f"{prefix}{tap}" for tap in TAPS]
    inside = (labels >= 0).numpy()  # neither padded nor ignored
    pairs = zip(tapped(student.backbone, images), tapped(teacher.backbone, images), strict=True)
    total = 0.0
    for number, (maps, teacher_maps) in enumerate(pairs):
        position = module.distiller.positions[number]
        # A position counts if its centre is in the image; of even strides, that is where its lower right half begins.
        stride = images.shape[2] // maps.shape[2]
        mask = inside[:, stride // 2 :: stride, stride // 2 :: stride][:, None]
        zeroed = maps * torch.from_numpy(mask)  # as the normalisation sees it
        deviation = (zeroed.var((0, 2, 3), correction=0, keepdim=True) + position.norm.eps) ** 0.5
        values = (zeroed - zeroed.mean((0, 2, 3), keepdim=True)) / deviation
        index = position.index.numpy()
        target = oracles.reduce_channels(teacher_maps.numpy(), index, "amp")
        bn = teacher.backbone.get_submodule(TAPS[number].partition(".relu2")[0]).bn2
        margin = oracles.batchnorm_margin(bn.weight.detach().numpy(), bn.bias.detach().numpy())
        goal = np.maximum(target, oracles.reduce_margin(margin, index, "amp")[None, :, None, None])
        squares = ((values.numpy() - goal) ** 2 * ((values.numpy() > goal) | (goal > 0)) * mask).sum()
        total += 5.0 * squares / (mask.sum() * maps.shape[1])
    assert losses["features"].item() == pytest.approx(total, rel=2e-3)


HALF = "{mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}"


@pytest.mark.parametrize("method", ["mgd-amp", "mgd-amp+kd", "kd"])
def test_each_network_sees_the_same_pixels_by_its_own_mean(pixelset, method):
    """The teacher's backbone alone is distilled without kd; with it, and in validation, all of the teacher runs."""
    arguments = (f"--distillation.method={method}", "--data.flip=false", "--data.scale=[1, 1]")
    usual = pixelset(*arguments).data
    recipe = pixelset(*arguments, f"--student.preparation={HALF}")
    module = build_module(recipe)
    usual.setup()
    if isinstance(module.distiller, MatchingDistiller):
        module.refresh(recipe.data.refresh_dataloader(8, 0))
    seen = {"student": [], "teacher": []}
    for role, network in (("student", module.network()), ("teacher", module.teacher)):
        first = next(each for each in network.modules() if isinstance(each, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, args, role=role: seen[role].append(args[0].clone()))
    (images, labels), (expected, _) = (next(iter(data.val_dataloader())) for data in (recipe.data, usual))
    inside = (labels != PADDED)[:, None].expand_as(images)
    assert not torch.allclose(images[inside], expected[inside])
    module.train().batch_losses((images, labels))
    module.eval()
    with torch.no_grad():
        module.teacher(images)
    assert len(seen["teacher"]) == 2
    for found in seen["teacher"]:
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-5)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (IMAGENET.mean, IMAGENET.std))
    whole = expected * deviation + mean
    torch.testing.assert_close(seen["student"][0][inside], ((whole - 0.5) / 0.25)[inside], rtol=0, atol=1e-5)
    described = TASKS["segmentation"].describe(recipe.data)
    card = TASKS["segmentation"].card(module.network(), {**described, "name": "a:b", "options": {}}, {})
    predicting = TASKS["segmentation"].predicting({**card.config, "label_names": ["a", "b", "c"], "num_classes": 3})
    assert predicting.preparation.mean == (0.5, 0.5, 0.5)


def test_kd_alone_needs_no_features(pixelset):
    module, (images, labels) = ready(pixelset, "--distillation.method=kd", "--training.loss=none")
    assert module.distiller is None
    teacher, student = copy.deepcopy(module.teacher), copy.deepcopy(module.network())
    losses = module.batch_losses((images, labels))
    assert losses.keys() == {"kd"}
    taught = teacher.eval()(images)["out"]
    expected = pixel_kd_loss(student(images)["out"], taught, labels, module.distillation.kd_temperature)
    assert losses["kd"].item() == pytest.approx(module.distillation.weight("kd") * expected.item(), rel=1e-5)
    losses["kd"].backward()
    assert all(weight.grad is None for weight in module.teacher.parameters())


def test_taps_may_be_in_the_decoder(pixelset):
    taps = "--distillation.taps=[[backbone.layer2.relu2:input,backbone.layer2.relu2:input],[neck.2:input,neck.2:input]]"
    module, batch = ready(pixelset, taps)
    assert [str(position.teacher) for position in module.distiller.positions] == [
        "backbone.layer2.relu2:input",
        "neck.2:input",
    ]
    module.batch_losses(batch)["features"].backward()
    assert module.network().neck[0].weight.grad.abs().sum() > 0
    inside, _ = ready(pixelset, f"--distillation.taps=[[{TAPS[1]},{TAPS[1]}]]")
    assert [str(position.student) for position in inside.distiller.positions] == [TAPS[1]]
    with pytest.raises(ValueError, match="nowhere"):
        ready(pixelset, "--distillation.taps=[[nowhere:input,nowhere:input]]")


def test_a_refresh_leaves_padded_and_ignored_pixels_out_and_the_norms_as_they_are(pixelset):
    module, (images, labels) = ready(pixelset)
    before = copy.deepcopy(module.network().state_dict())
    cost = module.refresh(
        pixelset("--data.flip=false", "--data.scale=[0.8,0.8]", "--data.batch_size=8").data.refresh_dataloader(8, 0)
    )[1].cost
    assert all(torch.equal(value, before[name]) for name, value in module.network().state_dict().items())
    order = pixelset("--data.flip=false", "--data.scale=[0.8,0.8]", "--data.batch_size=8").data.refresh_dataloader(8, 0)
    images, labels = next(iter(order))
    student, teacher = (
        tapped(network.eval().backbone, images)[1].double() for network in (module.network(), module.teacher)
    )
    mask = (labels >= 0)[:, 2::4, 2::4]

    def unit(maps):
        maps = maps * mask[:, None]
        return maps / maps.flatten(2).norm(dim=2)[:, :, None, None]

    difference = unit(student)[:, :, None] - unit(teacher)[:, None]
    assert torch.allclose(cost.double(), difference.square().sum((3, 4)).mean(0), atol=1e-4)


class Brighter(nn.Module):
    """Class 1 is what is brighter than the mean of the whole image, which padding would change."""

    def forward(self, images):
        gray = images.mean(1)
        return torch.stack([gray.mean((1, 2), keepdim=True).expand_as(gray), gray, gray - 100], 1)


def test_images_of_several_sizes_are_measured_one_by_one(pixelset):
    module, _ = ready(pixelset)
    data = pixelset("--data.batch_size=5").data
    batch = next(iter(data.val_dataloader()))
    assert (batch[1] == PADDED).any()
    network, measure, expected = Brighter(), pixel_measures(3), pixel_measures(3)
    module.measure(measure, network, batch)
    for number in range(5):
        image, labels = data.val_set[number]
        expected.update((image.mean(0) > image.mean()).long()[None], labels[None])
    assert all(torch.equal(value, expected.compute()[name]) for name, value in measure.compute().items())
    assert module.results(measure.compute()).keys() >= {"miou", "pixel_accuracy", *(f"iou_{name}" for name in CLASSES)}
    sizes = [tuple(labels.shape[1:]) for _, labels in alone(*batch)]
    assert sizes == [tuple(data.val_set[number].labels.shape) for number in range(5)]
    assert counted(torch.zeros(1, 2, 2)) is None


def test_outputs_of_many_forms():
    logits, aux = torch.zeros(1, 4, 3, 3), torch.ones(1, 4, 3, 3)
    named = type("Output", (), {"logits": logits})()
    for output in (logits, (logits, aux), {"out": logits, "aux": aux}, {"logits": logits}, named):
        assert outputs_in(output).logits is logits
    assert outputs_in({"out": logits, "aux": aux}).aux is aux
    assert outputs_in({"out": logits}).resized((6, 5)).logits.shape == (1, 4, 6, 5)
    for output in ({"boxes": logits}, [], None):
        with pytest.raises(ValueError, match="expected logits"):
            outputs_in(output)


class Even(SmallSegmenter):
    """Takes multiples of 32 alone, as most networks of segmentation_models_pytorch."""

    requires_divisible_input_shape = True

    def __init__(self):
        super().__init__(3, 8, aux=False)
        self.backbone.output_stride = 32

    def forward(self, images):
        assert not any(side % 32 for side in images.shape[2:])
        return super().forward(images)


def test_images_are_padded_for_networks_that_take_certain_sizes(pixelset):
    network = Even().eval()
    images = torch.rand(2, 3, 40, 70)
    padded = F.pad(images, (0, 26, 0, 24))
    with torch.no_grad():
        assert torch.equal(segment(network, images).logits, network(padded)["out"][..., :40, :70])
    assert segment(network, torch.rand(1, 3, 32, 32)).logits.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Conv2d(3, 5, 1), r"gives \(2, 5, 32, 40\) for 2 images, but the data has 3 classes"),
        (nn.Flatten(), "gives"),
        (nn.Conv2d(4, 3, 1), r"does not take images of shape \(3, 32, 40\)"),
    ],
)
def test_networks_that_do_not_fit_are_named(pixelset, network, said):
    data = pixelset().data
    data.setup()
    with pytest.raises(ValueError, match=said):
        TASKS["segmentation"].check(network, data, "student")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training.loss=bce"], "training.loss is 'bce': segmentation has ce, ce.dice, none"),
        (["--training.mixup=1"], "training.mixup is for images with one label each"),
        (["--training.class_weights=balanced"], "training.class_weights is 'balanced'"),
        (["--training.loss=none"], "give a method with kd"),
        (["--distillation.pyramid=true"], "distillation.pyramid is not for segmentation"),
        (["--trainer.compile=true"], "trainer.compile is not for segmentation"),
    ],
)
def test_settings_that_do_not_fit(pixelset, arguments, said):
    with pytest.raises(ValueError, match=said):
        pixelset(*arguments)


def test_class_weights_are_one_for_each_class(pixelset):
    with pytest.raises(ValueError, match=r"training.class_weights has 2 numbers for 3 classes"):
        build_module(pixelset("--training.class_weights=[1,2]"))


@pytest.mark.parametrize("architecture", ["deeplabv3", "fcn", "lraspp"])
def test_segmenters_over_any_backbone(architecture):
    model = segmenter(
        4, architecture, "timm:resnet18", output_stride=8, head_channels=16, aux_loss=architecture != "lraspp"
    )
    output = model.train()(torch.rand(2, 3, 64, 48))
    assert {name: tuple(value.shape) for name, value in output.items()} == dict.fromkeys(
        ["out", "aux"] if architecture != "lraspp" else ["out"], (2, 4, 64, 48)
    )
    strides = [64 // maps.shape[2] for maps in model.backbone(torch.rand(1, 3, 64, 48)).values()]
    assert strides[-1] == 8


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_networks_of_torchvision_by_name(name):
    model = build_segmenter(f"torchvision:{name}", 4).eval()
    with torch.no_grad():
        assert segment(model, torch.rand(1, 3, 33, 40)).logits.shape == (1, 4, 33, 40)


@pytest.mark.parametrize("name", ["smp:Unet", "smp:FPN"])
def test_networks_of_smp_by_name(name):
    pytest.importorskip("segmentation_models_pytorch")
    model = build_segmenter(name, 4, encoder_name="resnet18").eval()
    with torch.no_grad():
        assert segment(model, torch.rand(1, 3, 40, 70)).logits.shape == (1, 4, 40, 70)
    with pytest.raises(ValueError, match="encoder_weights"):
        build_segmenter(name, 4, "pretrained")
    with pytest.raises(ValueError, match="cannot be built"):
        build_segmenter(name, 4, nothing=3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("smp:Unett", {}, "did you mean 'Unet'"),
        ("matchdistill.models:segmenter", {"architecture": "deeplab"}, "expected one of deeplabv3, fcn, lraspp"),
        ("matchdistill.models:segmenter", {"backbone": "torchvision:resnet18"}, "expected 'timm:NAME'"),
        ("matchdistill.models:segmenter", {"output_stride": 4}, "expected 8, 16 or 32"),
    ],
)
def test_names_and_options_that_do_not_exist(name, options, said):
    with pytest.raises(ValueError, match=said):
        build_segmenter(name, 3, **options)

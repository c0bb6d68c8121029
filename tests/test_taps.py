"""Taps that are found by tracing: torchvision's and timm's networks, networks written by hand, and errors.

Axes: N images, C channels, H and W positions, T tokens.
"""

import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from matchdistill import MatchingDistiller, Tap, find_taps
from matchdistill.candidates import Candidate, candidates
from matchdistill.choice import choose, pair_candidates
from matchdistill.encoder import encoders
from matchdistill.taps import margin_source, resolve, tapped_operation, unwrapped
from matchdistill.trace import Trace
from networks import PLAIN_TAPS, Function, Plain, conv_bn

SMALL = torch.zeros(2, 3, 32, 32)


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str, size: int = 64, **options: Any) -> nn.Module:
    library, name = name.split(":")
    if library == "timm":
        sized = {"img_size": size} if name.split("_")[0] in ("vit", "deit", "swin") else {}
        window = {"window_size": 2} if name.startswith("swin") and size == 64 else {}
        return timm.create_model(name, **sized, **window, **options)
    if name.startswith("vit"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, weights=None, **options)


@functools.cache
def traced(name: str, size: int) -> Trace:
    """On the meta device, which does no arithmetic."""
    try:
        with torch.device("meta"):
            model = build(name, size)
    except NotImplementedError:
        model = build(name, size).to("meta")
    return Trace(model, (torch.zeros(2, 3, size, size, device="meta"),))


@functools.cache
def stages(trace: Trace) -> list[list[Candidate]]:
    (encoder,) = encoders(trace)
    return candidates(encoder)


def preferred(trace: Trace) -> list[Candidate]:
    return [group[-1] for group in stages(trace)]


def chosen(trace: Trace) -> list[str]:
    return [str(candidate.tap) for candidate in preferred(trace)]


def inputs(*paths: str) -> list[str]:
    return [f"{path}:input" for path in paths]


def outputs(*paths: str) -> list[str]:
    return [f"{path}:output" for path in paths]


TORCHVISION_STAGES = inputs("relu", "layer1.2.relu", "layer2.3.relu", "layer3.5.relu", "layer4.2.relu")
TIMM_STAGES = inputs("act1", "layer1.2.act3", "layer2.3.act3", "layer3.5.act3", "layer4.2.act3")
VGG = inputs("features.2", "features.6", "features.13", "features.20", "features.27")
FOUND = {
    "torchvision:resnet18": inputs("relu", "layer1.1.relu", "layer2.1.relu", "layer3.1.relu", "layer4.1.relu"),
    "torchvision:resnet50": TORCHVISION_STAGES,
    "torchvision:resnext50_32x4d": TORCHVISION_STAGES,
    "torchvision:wide_resnet50_2": TORCHVISION_STAGES,
    "torchvision:regnet_x_400mf": inputs(
        "stem.2",
        "trunk_output.block1.block1-0.activation",
        "trunk_output.block2.block2-1.activation",
        "trunk_output.block3.block3-6.activation",
        "trunk_output.block4.block4-11.activation",
    ),
    "torchvision:regnet_y_400mf": inputs(
        "stem.2",
        "trunk_output.block1.block1-0.activation",
        "trunk_output.block2.block2-2.activation",
        "trunk_output.block3.block3-5.activation",
        "trunk_output.block4.block4-5.activation",
    ),
    "torchvision:vgg11_bn": VGG,
    "torchvision:densenet121": [
        *inputs("features.relu0", *(f"features.transition{number}.relu" for number in (1, 2, 3))),
        "features.norm5:output",
    ],
    "torchvision:mobilenet_v2": inputs(
        *(f"features.{block}.conv.0.2" for block in (2, 4, 7, 14)),
        "features.18.2",
    ),
    "torchvision:mobilenet_v3_small": inputs(
        "features.0.2", *(f"features.{block}.block.0.2" for block in (2, 4, 9)), "features.12.2"
    ),
    "torchvision:mobilenet_v3_large": inputs(
        *(f"features.{block}.block.0.2" for block in (2, 4, 7, 13)), "features.16.2"
    ),
    "torchvision:efficientnet_b0": inputs(*(f"features.{stage}.0.block.0.2" for stage in (2, 3, 4, 6)), "features.8.2"),
    "torchvision:mnasnet1_0": inputs(*(f"layers.{stage}.0.layers.2" for stage in (8, 9, 10, 12)), "layers.16"),
    "torchvision:shufflenet_v2_x1_0": ["conv1.2:input", "stage2.3:output", "stage3.7:output", "conv5.2:input"],
    "torchvision:googlenet": outputs("conv1.bn", "conv3.bn", "inception3b", "inception4e", "inception5b"),
    "torchvision:inception_v3": outputs("Conv2d_2b_3x3.bn", "Conv2d_4a_3x3.bn", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
    "torchvision:convnext_tiny": outputs("features.1.2", "features.3.2", "features.5.8", "features.7.2"),
    "torchvision:vit_b_16": outputs("encoder.layers.encoder_layer_11"),
    "torchvision:swin_t": outputs("features.1.1", "features.3.1", "features.5.5", "features.7.1"),
    "torchvision:swin_v2_t": outputs("features.1.1", "features.3.1", "features.5.5", "features.7.1"),
    "timm:resnet18": inputs("act1", "layer1.1.act2", "layer2.1.act2", "layer3.1.act2", "layer4.1.act2"),
    "timm:resnet50": TIMM_STAGES,
    "timm:resnext50_32x4d": TIMM_STAGES,
    "timm:wide_resnet50_2": TIMM_STAGES,
    "timm:regnetx_004": inputs("stem.bn.act", "s1.b1.act3", "s2.b2.act3", "s3.b7.act3", "s4.b12.act3"),
    "timm:regnety_004": inputs("stem.bn.act", "s1.b1.act3", "s2.b3.act3", "s3.b6.act3", "s4.b6.act3"),
    "timm:vgg11_bn": VGG,
    "timm:densenet121": inputs(
        "features.norm0.act",
        *(f"features.transition{number}.norm.act" for number in (1, 2, 3)),
        "features.norm5.act",
    ),
    "timm:mobilenetv1_100": inputs(*(f"blocks.{block}.bn2.act" for block in ("0.0", "1.1", "2.1", "3.5", "4.1"))),
    "timm:mobilenetv2_100": inputs(*(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 3, 5)), "bn2.act"),
    "timm:mobilenetv3_small_100": inputs("bn1.act", *(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 4, 5))),
    "timm:mobilenetv3_large_100": inputs(*(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 3, 5, 6))),
    "timm:efficientnet_b0": inputs(*(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 3, 5)), "bn2.act"),
    "timm:efficientnet_lite0": inputs(*(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 3, 5)), "bn2.act"),
    "timm:mnasnet_100": inputs(*(f"blocks.{stage}.0.bn1.act" for stage in (1, 2, 3, 5)), "bn2.act"),
    "timm:inception_v3": [
        *inputs("Conv2d_2b_3x3.bn.act", "Conv2d_4a_3x3.bn.act"),
        *outputs("Mixed_5d", "Mixed_6e", "Mixed_7c"),
    ],
    "timm:convnext_atto": outputs(*(f"stages.{stage}.blocks.{block}" for stage, block in enumerate((1, 1, 5, 1)))),
    "timm:vit_tiny_patch16_224": outputs("blocks.11"),
    "timm:deit_tiny_patch16_224": outputs("blocks.11"),
    "timm:deit_tiny_distilled_patch16_224": outputs("blocks.11"),
    "timm:swin_tiny_patch4_window7_224": outputs(
        *(f"layers.{stage}.blocks.{block}" for stage, block in enumerate((1, 1, 5, 1)))
    ),
}
INCEPTION = {name for name in FOUND if "inception" in name}
TOKENS = {name for name in FOUND if ":vit" in name or ":deit" in name}
# Where the last maps of Inception-V3 are single values, which are no position.
SHALLOW = {75: 4, 96: 4}


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("name", [name for name in FOUND if name not in INCEPTION])
def test_last_cut_of_every_resolution(name: str, size: int) -> None:
    assert chosen(traced(name, size)) == FOUND[name]


@pytest.mark.parametrize("size", [75, 96, 224, 299])
@pytest.mark.parametrize("name", sorted(INCEPTION))
def test_last_cut_of_every_resolution_of_inception(name: str, size: int) -> None:
    assert chosen(traced(name, size)) == FOUND[name][: SHALLOW.get(size)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_a_pass_with_numbers_gives_the_same(name: str) -> None:
    model = build(name, 224, num_classes=10)
    assert chosen(Trace(model, (torch.randn(2, 3, 224, 224),))) == FOUND[name]


@pytest.mark.parametrize("name", sorted(TOKENS))
@pytest.mark.parametrize("size", [64, 224])
def test_every_block_of_a_network_of_one_resolution_is_a_candidate(name: str, size: int) -> None:
    (group,) = stages(traced(name, size))
    block = FOUND[name][0].removesuffix("11:output")
    assert [str(candidate.tap) for candidate in group] == outputs(*(f"{block}{number}" for number in range(12)))
    assert {candidate.tap.channel_dim for candidate in group} == {2}


@pytest.mark.parametrize("teacher", FOUND)
def test_every_pair_of_networks_has_positions(teacher: str) -> None:
    for student in FOUND:
        traces = traced(teacher, 224), traced(student, 224)
        pairs = pair_candidates(*(stages(trace) for trace in traces), 4)
        if {teacher, student} & TOKENS:
            assert len(pairs) == 4
        else:
            sizes = [[candidate.operation.positions for candidate in preferred(trace)] for trace in traces]
            # ConvNeXt and Swin begin at a quarter of the resolution, ShuffleNet-V2 leaves it out. VGG ends at a sixteenth:
            # what is coarser goes with its last blocks.
            common = [size for size in sizes[1] if size < sizes[0][-1] or any(0.5 < o / size < 2 for o in sizes[0])]
            assert len(pairs) == min(4, len(common)) >= 3
            assert [second.operation.positions for _, second in pairs] == common[-4:]
            for first, second in pairs:
                ratio = first.operation.positions / second.operation.positions
                assert 0.5 < ratio < 2 or second.operation.positions < sizes[0][-1]
        for role in zip(*pairs, strict=True):
            numbers = [candidate.operation.number for candidate in role]
            assert numbers == sorted(set(numbers))


def test_positions_of_the_paper() -> None:
    """All but MobileNet-V2's: there, the last activation of a resolution opens the first block of the next one."""
    resnet, mobilenet, shufflenet = (
        traced(name, 224) for name in ("torchvision:resnet50", "timm:mobilenetv1_100", "torchvision:shufflenet_v2_x1_0")
    )
    assert [(str(first.tap), str(second.tap)) for first, second in choose(resnet, mobilenet)] == [
        ("layer1.2.relu:input", "blocks.1.1.bn2.act:input"),
        ("layer2.3.relu:input", "blocks.2.1.bn2.act:input"),
        ("layer3.5.relu:input", "blocks.3.5.bn2.act:input"),
        ("layer4.2.relu:input", "blocks.4.1.bn2.act:input"),
    ]
    widths = [(first.operation.channels, second.operation.channels) for first, second in choose(resnet, mobilenet)]
    assert widths == [(256, 128), (512, 256), (1024, 512), (2048, 1024)]
    assert [(str(first.tap), str(second.tap)) for first, second in choose(resnet, shufflenet)][1:3] == [
        ("layer2.3.relu:input", "stage2.3:output"),
        ("layer3.5.relu:input", "stage3.7:output"),
    ]
    assert [second.operation.channels for _, second in choose(resnet, shufflenet)][1:3] == [116, 232]


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("torchvision:resnet50", ["bn1", "layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
        ("timm:resnet18", ["bn1", "layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]),
        ("timm:mobilenetv1_100", [f"blocks.{block}.bn2" for block in ("0.0", "1.1", "2.1", "3.5", "4.1")]),
        (
            "torchvision:densenet121",
            [f"features.{norm}" for norm in ("norm0", *(f"transition{n}.norm" for n in (1, 2, 3)), "norm5")],
        ),
        ("torchvision:shufflenet_v2_x1_0", ["conv1.1", None, None, "conv5.1"]),
        ("torchvision:googlenet", ["conv1.bn", "conv3.bn", None, None, None]),
        ("torchvision:convnext_tiny", [None] * 4),
        ("timm:vit_tiny_patch16_224", [None]),
    ],
)
def test_norm_that_gives_the_margins(name: str, sources: list[str | None]) -> None:
    trace = traced(name, 224)
    assert [margin_source(trace, candidate.operation) for candidate in preferred(trace)] == sources


class Basic(nn.Module):
    """A residual block whose activations are functions."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(channels_in, channels_out, stride)
        self.second = conv_bn(channels_out, channels_out)
        self.shortcut = conv_bn(channels_in, channels_out, stride, 1) if stride > 1 else nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(self.shortcut(values) + self.second(F.relu(self.first(values), inplace=True)))


class PreActivation(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.first = conv_bn(channels_in, channels_out, stride)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        return self.shortcut(values) + self.second(F.relu(self.first(F.relu(self.norm(values)))))


class Dense(nn.Module):
    """Concatenates what it makes to what it was given."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.branch = conv_bn(channels, growth)

    def forward(self, values: Tensor) -> Tensor:
        return torch.cat([values, F.relu(self.branch(values))], dim=1)


class UNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = (
            conv_bn(3, width),
            conv_bn(width, 2 * width),
            conv_bn(2 * width, 4 * width),
        )
        self.up2, self.up1 = conv_bn(6 * width, 2 * width), conv_bn(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = F.relu(self.down1(images))
        coarse = F.relu(self.down2(F.max_pool2d(fine, 2)))
        values = F.relu(self.middle(F.max_pool2d(coarse, 2)))
        values = F.relu(self.up2(torch.cat([F.interpolate(values, scale_factor=2), coarse], dim=1)))
        return self.head(F.relu(self.up1(torch.cat([F.interpolate(values, scale_factor=2), fine], dim=1))))


class SharedReLU(nn.Module):
    """One activation module for the whole network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            conv_bn(3, width, 2),
            conv_bn(width, 2 * width, 2),
            conv_bn(2 * width, 9, 2),
        )
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = self.relu(self.conv2(self.relu(self.conv1(images))))
        return self.fc(self.relu(self.relu(self.conv3(values)).mean((2, 3))))


class SharedBlock(nn.Module):
    """One block at three resolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.block, self.fc = conv_bn(3, width, 2), conv_bn(width, width), nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = F.relu(self.stem(images))
        for _ in range(3):
            values = F.max_pool2d(F.relu(self.block(values)), 2)
        return self.fc(values.mean((2, 3)))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values * values.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        gate = values.sigmoid()
        return gradient * gate * (1 + values * (1 - gate))


class Custom(nn.Module):
    """Calls autograd functions between its layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, width, 2), conv_bn(width, width, 2), conv_bn(width, width, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = Swish.apply(self.second(Swish.apply(self.first(images))))
        return {"out": F.relu(self.third(values))}


def scripted_inside(width: int) -> nn.Module:
    middle = torch.jit.script(nn.Sequential(conv_bn(width, width), nn.ReLU()))
    return nn.Sequential(conv_bn(3, width, 2), nn.ReLU(), middle, conv_bn(width, width, 2), nn.ReLU(), nn.Flatten())


def fused(values: Tensor) -> Tensor:
    return torch.relu(values) * 0.5


def scripted_functions(width: int) -> nn.Module:
    scripted = torch.jit.script(fused)
    return Function(
        lambda self, x: scripted(self.second(scripted(self.first(x)))),
        first=conv_bn(3, width, 2),
        second=conv_bn(width, width, 2),
    )


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))


HAND_MADE: dict[str, tuple[Callable[[int], nn.Module], list[str]]] = {
    "plain": (Plain, inputs("relu0", "relu1", "relu2")),
    "functional residual": (
        lambda width: chain(
            conv_bn(3, width),
            Basic(width, width, 1),
            Basic(width, 2 * width, 2),
            Basic(2 * width, 2 * width, 1),
            Basic(2 * width, 4 * width, 2),
        ),
        [
            "1.shortcut:output + 1.second.1:output",
            "3.shortcut:output + 3.second.1:output",
            "4.shortcut.1:output + 4.second.1:output",
        ],
    ),
    "pre-activation": (
        lambda width: chain(
            nn.Conv2d(3, width, 3, 1, 1),
            PreActivation(width, width, 1),
            PreActivation(width, 2 * width, 2),
            PreActivation(2 * width, 2 * width, 1),
            PreActivation(2 * width, 4 * width, 2),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        ),
        [*outputs("1", "3"), "6:input"],
    ),
    "concatenations": (
        lambda width: chain(
            conv_bn(3, width), Dense(width, 4), Dense(width + 4, 4), nn.MaxPool2d(2), Dense(width + 8, 4)
        ),
        outputs("2", "4"),
    ),
    "u-net": (UNet, outputs("down1.1", "down2.1", "middle.1")),
    "shared relu": (SharedReLU, outputs("conv1.1", "conv2.1", "conv3.1")),
    "shared block": (SharedBlock, outputs("stem.1", "block.1")),
    "autograd functions": (Custom, outputs("first.1", "second.1", "third.1")),
    "scripted module": (scripted_inside, inputs("1", "4")),
    "scripted functions": (scripted_functions, outputs("first.1", "second.1")),
    "activations without a name": (
        lambda width: chain(
            conv_bn(3, width, 2),
            Function(lambda self, x: x * x.sigmoid()),
            conv_bn(width, width, 2),
            nn.Hardsigmoid(),
        ),
        outputs("0.1", "2.1"),
    ),
    "other activations": (
        lambda width: chain(
            conv_bn(3, width, 2),
            nn.PReLU(width),
            conv_bn(width, width, 2),
            nn.LeakyReLU(),
            conv_bn(width, 6, 2),
            nn.SELU(),
        ),
        inputs("1", "3", "5"),
    ),
    "dropout and nested wrappers": (
        lambda width: nn.Sequential(
            OrderedDict(
                backbone=nn.Sequential(nn.Sequential(conv_bn(3, width, 2)), nn.ReLU(), nn.Dropout(), nn.Identity()),
                neck=nn.Sequential(conv_bn(width, width, 2), nn.Dropout2d(), nn.ReLU()),
            )
        ),
        inputs("backbone.1", "neck.2"),
    ),
    "frozen norms": (
        lambda width: nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            torchvision.ops.FrozenBatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4, 3, 2, 1),
        ),
        ["2:input", "3:output"],
    ),
    "group norms": (
        lambda width: nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.GroupNorm(2, width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 4),
            nn.ReLU(),
        ),
        inputs("4", "2"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Lazy modules")
@pytest.mark.parametrize("name", HAND_MADE)
def test_networks_written_by_hand(name: str) -> None:
    make, taps = HAND_MADE[name]
    torch.manual_seed(0)
    teacher, student = make(12), make(6)
    assert chosen(Trace(teacher, (SMALL,))) == taps
    images = torch.randn(4, 3, 32, 32)
    distiller = MatchingDistiller(teacher, student, example=SMALL)
    distiller.refresh([images])
    train_once(distiller, images)


def train_once(distiller: MatchingDistiller, *args: Any) -> None:
    """One step: a finite loss, with gradients at every position's student norm and nowhere in the teacher."""
    distiller.train()
    _, loss = distiller(*args)
    assert loss.isfinite()
    assert loss > 0
    loss.backward()
    gradients = [parameter.grad for parameter in distiller.student.parameters() if parameter.grad is not None]
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(position.norm.weight.grad is not None for position in distiller.positions)
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert not any(module.training for module in distiller.teacher.modules())


PAIRS = [
    ("torchvision:resnet50", "timm:mobilenetv1_100"),
    ("torchvision:resnet18", "torchvision:shufflenet_v2_x1_0"),
    ("timm:resnet50", "torchvision:resnet18"),
    ("torchvision:resnext50_32x4d", "torchvision:mobilenet_v2"),
    ("timm:wide_resnet50_2", "timm:mnasnet_100"),
    ("torchvision:regnet_y_400mf", "timm:regnetx_004"),
    ("timm:vgg11_bn", "timm:mobilenetv3_small_100"),
    ("torchvision:densenet121", "timm:mobilenetv2_100"),
    ("timm:efficientnet_b0", "timm:efficientnet_lite0"),
    ("torchvision:googlenet", "torchvision:mobilenet_v3_small"),
    ("torchvision:convnext_tiny", "timm:convnext_atto"),
    ("timm:resnet18", "timm:vit_tiny_patch16_224"),
    ("timm:deit_tiny_distilled_patch16_224", "timm:resnet18"),
    ("timm:deit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
    ("torchvision:swin_t", "torchvision:resnet18"),
    ("timm:mobilenetv3_large_100", "timm:swin_tiny_patch4_window7_224"),
]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_pairs_of_networks_train(teacher: str, student: str) -> None:
    torch.manual_seed(0)
    distiller = MatchingDistiller(
        build(teacher, num_classes=7), build(student, num_classes=7), example=torch.zeros(1, 3, 64, 64)
    )
    assert len(distiller.positions) == 4
    images = torch.randn(4, 3, 64, 64)
    distiller.refresh([images])
    train_once(distiller, images)


def test_inception_at_its_smallest_input_trains() -> None:
    torch.manual_seed(0)
    distiller = MatchingDistiller(
        build("torchvision:inception_v3", num_classes=7),
        build("timm:mobilenetv2_100", num_classes=7),
        example=torch.zeros(1, 3, 75, 75),
    )
    assert len(distiller.positions) == 4
    images = torch.randn(4, 3, 75, 75)
    distiller.refresh([images])
    train_once(distiller, images)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_pairs_train_at_224(seed: int) -> None:
    names = sorted(FOUND)
    teacher, student = (names[int(n)] for n in torch.randperm(len(names), generator=torch.manual_seed(seed))[:2])
    distiller = MatchingDistiller(build(teacher, 224, num_classes=7), build(student, 224, num_classes=7))
    images = torch.randn(4, 3, 224, 224)
    distiller.refresh([images])
    train_once(distiller, images)


@pytest.mark.parametrize(
    ("teacher", "student"), [("plain", "functional residual"), ("u-net", "plain"), ("shared relu", "concatenations")]
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_hand_made_pairs_across_kinds_train(teacher: str, student: str) -> None:
    torch.manual_seed(0)
    networks = HAND_MADE[teacher][0](12), HAND_MADE[student][0](6)
    distiller = MatchingDistiller(*networks, example=SMALL)
    images = torch.randn(4, 3, 32, 32)
    distiller.refresh([images])
    train_once(distiller, images)


def test_networks_that_return_the_maps_of_every_stage() -> None:
    """What a detector's backbone gives its neck: a map is no less a cut for being returned."""
    stages = {f"layer{number}": str(number) for number in (1, 2, 3, 4)}
    body = torchvision.models._utils.IntermediateLayerGetter(build("torchvision:resnet50"), stages)
    listed = timm.create_model("resnet18", features_only=True)
    assert [(str(first), str(second)) for first, second in find_taps(body, listed, torch.zeros(1, 3, 64, 64))] == [
        (f"layer{number}.{last}.relu:input", f"layer{number}.1.act2:input")
        for number, last in zip((1, 2, 3, 4), (2, 3, 5, 2), strict=True)
    ]


def test_images_that_are_not_square() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=(128, 64), num_classes=7)
    distiller = MatchingDistiller(teacher, build("timm:resnet18", num_classes=7), example=torch.zeros(1, 3, 128, 64))
    images = torch.randn(4, 3, 128, 64)
    distiller.refresh([images])
    train_once(distiller, images)
    sizes = []
    with distiller.capture() as captured:
        distiller.student(images)
    for number, position in enumerate(distiller.positions):
        student, tokens = position.maps(captured.values[number], torch.randn(4, 33, 192))
        sizes.append((tuple(student.shape[2:]), tuple(tokens.shape[2:])))
    assert sizes == [(size, size) for size in ((32, 16), (16, 8), (8, 4), (4, 2))]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    distiller = MatchingDistiller(Plain(8), Plain(4), example=SMALL).eval()
    images = torch.randn(4, 3, 16, 16)
    distiller.refresh([images])
    expected = distiller(images)[1]
    distiller.to(memory_format=memory_format)
    torch.testing.assert_close(distiller(images.to(memory_format=memory_format))[1], expected)


def test_one_channel_images() -> None:
    torch.manual_seed(0)
    distiller = MatchingDistiller(Plain(8, channels=1), Plain(4, channels=1))
    assert [(str(p.teacher), str(p.student)) for p in distiller.positions] == PLAIN_TAPS
    images = torch.randn(4, 1, 28, 28)
    distiller.refresh([images])
    train_once(distiller, images)


@pytest.mark.parametrize(
    ("forward", "example", "args", "kwargs"),
    [
        (lambda self, x, scale: self.net(x) * scale, (SMALL, 2.0), (2.0,), {}),
        (lambda self, x, y: self.net(x + y), (SMALL, SMALL), (torch.ones(()),), {}),
        (lambda self, x, *, scale=1.0: self.net(x) * scale, SMALL, (), {"scale": 2.0}),
    ],
)
def test_networks_that_take_more_than_images(forward: Any, example: Any, args: Any, kwargs: Any) -> None:
    torch.manual_seed(0)
    networks = Function(forward, net=Plain(8)), Function(forward, net=Plain(4))
    distiller = MatchingDistiller(*networks, example=example)
    assert [str(position.student) for position in distiller.positions] == inputs("net.relu0", "net.relu1", "net.relu2")
    images = torch.randn(4, 3, 16, 16)
    distiller.refresh([images], forward=lambda batch: distiller.student(batch, *args, **kwargs))
    distiller.train()
    _, loss = distiller(images, *args, **kwargs)
    assert loss.isfinite()


def test_networks_that_take_and_return_dictionaries() -> None:
    torch.manual_seed(0)

    def forward(self: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
        logits = self.net(batch["image"])
        return {"logits": logits, "more": [logits.argmax(1), {"constant": 3}]}

    distiller = MatchingDistiller(
        Function(forward, net=Plain(8)).double(),
        Function(forward, net=Plain(4)).double(),
        example=({"path": "a.jpg", "image": SMALL},),
    )
    batch = {"path": "b.jpg", "image": torch.randn(4, 3, 16, 16, dtype=torch.float64)}
    distiller.refresh([batch], forward=distiller.student)
    output, loss = distiller(batch)
    assert output["logits"].shape == (4, 5)
    assert loss.isfinite()


def test_networks_that_are_called_by_keyword() -> None:
    networks = [
        Function(lambda self, pixel_values=None, mask=None: self.net(pixel_values), net=Plain(width))
        for width in (8, 4)
    ]
    distiller = MatchingDistiller(*networks, example=SMALL)
    images = torch.randn(4, 3, 16, 16)
    distiller.refresh([images])
    expected = distiller(images)[1]
    torch.testing.assert_close(distiller(pixel_values=images)[1], expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_networks_are_seen_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    teacher, student = wrap(Plain(8)), wrap(Plain(4))
    assert [(str(a), str(b)) for a, b in find_taps(teacher, student, SMALL)] == PLAIN_TAPS
    assert unwrapped(teacher) is resolve(teacher, "")
    assert resolve(student, "bn1") is unwrapped(student).bn1


def test_networks_with_compiled_and_frozen_parts_train() -> None:
    torch.manual_seed(0)
    student = Plain(4)
    student.conv1.compile(backend="eager")
    student.compile(backend="eager")
    for module in (student.conv0, student.bn0):
        module.requires_grad_(False)
    distiller = MatchingDistiller(Plain(8), student, example=SMALL)
    assert [(str(p.teacher), str(p.student)) for p in distiller.positions] == PLAIN_TAPS
    distiller.refresh([torch.randn(4, 3, 8, 8)])
    train_once(distiller, torch.randn(4, 3, 8, 8))
    assert student.conv0.weight.grad is None
    assert student.conv1.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_take_the_size_of_the_example_or_of_an_earlier_pass() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3, 1, 1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))

    with pytest.raises(ValueError, match=r"lazy.*example="):
        find_taps(Plain(8), lazy())
    first, second = lazy(), lazy()
    find_taps(Plain(8), first, example=SMALL)
    second(SMALL)
    find_taps(Plain(8), second)
    for network in (first, second):
        assert network(SMALL).shape == (2, 3)


def test_teacher_and_student_of_other_floating_point_types() -> None:
    assert [(str(a), str(b)) for a, b in find_taps(Plain(8).double(), Plain(4).bfloat16())] == PLAIN_TAPS


def test_probing_changes_neither_the_example_nor_the_networks() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x.add_(1))

    networks = Function(forward, net=Plain(8)), Function(forward, net=Plain(4)).train()
    states = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    example = torch.zeros(2, 3, 16, 16)
    find_taps(*networks, example)
    assert not example.any()
    assert all(module.training for module in networks[1].modules())
    for network, state in zip(networks, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("size", [224, 299, 384, 64, 32, 28])
def test_common_sizes_are_tried_without_an_example(size: int) -> None:
    def sized(width: int) -> nn.Module:
        return nn.Sequential(conv_bn(3, width), nn.ReLU(), nn.Flatten(), nn.Linear(width * size * size, 2, bias=False))

    with torch.device("meta"):
        networks = sized(4), sized(2)
    assert [(str(a), str(b)) for a, b in find_taps(*networks)] == [("1:input", "1:input")]


@pytest.mark.parametrize("attribute", ["image_size", "pretrained_cfg"])
def test_sizes_that_networks_name_are_tried_first(attribute: str) -> None:
    seen = []
    networks = [Function(lambda self, x: (seen.append(x.shape[-1]), self.net(x))[1], net=Plain(w)) for w in (8, 4)]
    value = 40 if attribute == "image_size" else {"input_size": (3, 40, 40)}
    setattr(networks[1], attribute, value)
    find_taps(*networks)
    assert seen == [40, 40]


def test_a_size_that_an_assertion_without_a_message_refuses() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        assert x.shape[-1] == 64
        return self.net(x)

    assert find_taps(Plain(8), Function(forward, net=Plain(4)))
    with pytest.raises(
        ValueError, match=r"the student \(Function\) fails on an input of shape \(2, 3, 32, 32\): Asser"
    ):
        find_taps(Plain(8), Function(forward, net=Plain(4)), example=SMALL)


def test_a_network_that_takes_no_likely_size() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(17, 2))
    with pytest.raises(ValueError, match=r"the teacher \(Sequential\) fails on an input of shape .* Give example="):
        find_taps(network, Plain(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_scripted_networks_are_refused(role: str) -> None:
    networks = {"teacher": Plain(8), "student": Plain(4)}
    networks[role] = torch.jit.trace(networks[role].eval(), SMALL)
    with pytest.raises(ValueError, match=f"the {role} is a scripted module"):
        find_taps(**networks, example=SMALL)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_network_without_maps_lists_what_could_be_tapped(role: str) -> None:
    flat = nn.Sequential(
        OrderedDict(flat=nn.Flatten(), hidden=nn.Linear(3 * 32 * 32, 8), relu=nn.ReLU(), head=nn.Linear(8, 2))
    )
    networks = {"teacher": Plain(8), "student": Plain(4)} | {role: flat}
    with pytest.raises(
        ValueError,
        match=rf"no position in the {role}: .*flat \(2, 3072\), hidden \(2, 8\), relu \(2, 8\), head \(2, 2\)",
    ):
        find_taps(**networks, example=SMALL)


def test_networks_without_a_common_resolution_list_what_they_have() -> None:
    def network(stride: int) -> nn.Module:
        return nn.Sequential(conv_bn(3, 4, stride), nn.ReLU(), conv_bn(4, 4, 2), nn.ReLU())

    with pytest.raises(
        ValueError, match=r"Teacher: 1:input \(32, 32\), 3:input \(16, 16\)\. Student: 1:input \(8, 8\)"
    ):
        find_taps(network(1), network(4), example=SMALL)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit={limit}: expected at least 1"):
        find_taps(Plain(8), Plain(4), SMALL, limit=limit)


def test_limit_keeps_the_deepest() -> None:
    found = find_taps(Plain(8), Plain(4), SMALL, limit=2)
    assert [str(student) for _, student in found] == inputs("relu1", "relu2")


@pytest.mark.parametrize(
    ("blocks", "limit", "expected"), [(12, 4, [2, 5, 8, 11]), (6, 4, [0, 2, 3, 5]), (3, 4, [0, 1, 2])]
)
def test_blocks_at_even_distances(blocks: int, limit: int, expected: list[int]) -> None:
    def vit(depth: int) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=12, num_heads=3)

    found = find_taps(vit(12), vit(blocks), SMALL, limit=limit)
    assert [tap.module for _, tap in found] == [f"blocks.{number}" for number in expected]
    assert found[-1][0].module == "blocks.11"


def test_stages_are_paired_with_the_nearest_resolution() -> None:
    def network(*kernels: int) -> nn.Module:
        layers = [layer for kernel in kernels for layer in (nn.Conv2d(3, 3, kernel), nn.BatchNorm2d(3), nn.ReLU())]
        return nn.Sequential(*layers)

    # 28, 22, 17, 13 against 28, 17 px: 22 px is within a factor of two of 17 px, which is nearer to itself.
    found = find_taps(network(5, 7, 6, 5), network(5, 12), SMALL)
    assert [(first.module, second.module) for first, second in found] == [("2", "2"), ("8", "5")]


def test_resolution_that_differs_a_little_is_one() -> None:
    valid = nn.Sequential(conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4), nn.ReLU())
    assert chosen(Trace(valid, (SMALL,))) == inputs("4")


def test_margins_come_from_the_last_block_only() -> None:
    """A sum with blocks that have no norm is not described by the norm before them."""
    block = {"conv": nn.Conv2d(4, 4, 3, 1, 1)}
    residual = nn.Sequential(
        conv_bn(3, 4),
        Function(lambda self, x: x + self.conv(x), **block),
        Function(lambda self, x: x + self.conv(x), **block),
    )
    for model, expected in ((residual[:1], "0.1"), (residual[:2], "0.1"), (residual, None)):
        trace = Trace(model, (SMALL,))
        assert margin_source(trace, trace.operations[-1]) == expected


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (lambda self, x: x.mean() + self.norm(x), "norm"),
        (lambda self, x: F.dropout(self.norm(x), training=self.training), "norm"),
        (lambda self, x: self.norm(x) + self.other(x), "norm"),
        (lambda self, x: self.norm(x).permute(0, 2, 3, 1), "norm"),
        (lambda self, x: self.one(x.mean(1, keepdim=True)) + x.exp(), None),
        (lambda self, x: self.norm(x) * 2, None),
        (lambda self, x: torch.cat([self.norm(x), self.other(x)], 1), None),
        (lambda self, x: self.conv(self.norm(x)), None),
        (lambda self, x: self.plain(x), None),
        (lambda self, x: F.batch_norm(x, self.norm.running_mean, self.norm.running_var), None),
    ],
)
def test_what_a_norm_may_pass(tail: Any, expected: str | None) -> None:
    norms = {"norm": nn.BatchNorm2d(3), "other": nn.BatchNorm2d(3), "one": nn.BatchNorm2d(1)}
    norms["plain"] = nn.BatchNorm2d(3, affine=False)
    trace = Trace(Function(tail, conv=nn.Conv2d(3, 3, 1), **norms), (SMALL,))
    assert margin_source(trace, trace.operations[-1]) == expected


def test_reasons_are_given() -> None:
    (first, _), *_ = find_taps(Plain(8), Plain(4), SMALL)
    assert first.reason == "before the last activation at its resolution"
    assert Tap("a").reason == "given"


def test_tap_from_text() -> None:
    assert Tap.parse("layer1.2.relu:input") == Tap("layer1.2.relu", "input")
    assert Tap.parse("layer1") == Tap("layer1", "output")
    assert Tap.parse("") == Tap("", "output")
    assert str(Tap.parse("a.b:output")) == "a.b:output"
    assert Tap("a", reason="one") == Tap("a", reason="two")
    assert pickle.loads(pickle.dumps(Tap("a", "input", 2))) == Tap("a", "input", 2)


@pytest.mark.parametrize("text", ["layer1:inputs", "layer1:relu", "a:b:input"])
def test_unknown_side(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown side .*expected 'input' or 'output'"):
        Tap.parse(text)


def test_unknown_module_suggests_near_names() -> None:
    model = nn.Sequential(OrderedDict(layer1=nn.Sequential(OrderedDict(relu=nn.ReLU())), head=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match=r"Sequential has no module 'layer1.rleu'; did you mean 'layer1.relu'"):
        resolve(model, "layer1.rleu")
    with pytest.raises(ValueError, match=r"no module 'xyz': expected one of layer1, layer1.relu, head"):
        resolve(model, "xyz")


def test_sums_as_taps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, 4, 1))
    trace = Trace(model, (SMALL,))
    tap = Tap.parse("1.second + 1:input")
    assert tap == Tap("1.second", plus=Tap("1", "input"))
    assert Tap.parse(str(tap)) == tap
    assert tap.within("body") == Tap("body.1.second", plus=Tap("body.1", "input"))
    assert Tap("", "input").within("body") == Tap("body", "input")
    operation = tapped_operation(trace, model, tap)
    assert (operation.name, operation.channels) == ("add", 4)
    assert margin_source(trace, operation) == "1.second.1"
    assert tapped_operation(trace, model, replace(tap, channel_dim=-1)).channels_axis == 3
    for wrong in ("1.first + 1:input", "1.second + 1.second", "1.second.0 + 1:input"):
        with pytest.raises(ValueError, match=r"Sequential does not add the two values of tap .* \+ "):
            tapped_operation(trace, model, Tap.parse(wrong))
    with pytest.raises(ValueError, match="sum of more than two"):
        Tap.parse("first + second + shortcut")


def test_only_a_plain_sum_is_tapped_as_one() -> None:
    networks = {
        "output": lambda self, x: F.relu(torch.add(self.first(x), self.second(x), alpha=2)),
        "output + second:output": lambda self, x: F.relu(torch.add(self.first(x), self.second(x))),
    }
    for end, function in networks.items():
        model = Function(function, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 4, 1))
        assert chosen(Trace(model, (SMALL,))) == [f"first:{end}" if "+" in end else ":output"]


def test_frozen_norms_whose_statistics_may_be_folded_give_no_margins() -> None:
    """Their scale and shift are buffers, as Detectron2's are."""
    model = nn.Sequential(*conv_bn(3, 4), nn.ReLU())
    trace = Trace(model, (SMALL,))
    assert margin_source(trace, trace.operations[1]) == "1"
    for name in ("weight", "bias"):
        value = getattr(model[1], name).detach()
        delattr(model[1], name)
        model[1].register_buffer(name, value)
    assert margin_source(trace, trace.operations[1]) is None


def test_values_that_cannot_be_tapped() -> None:
    model = Function(
        lambda self, x: self.last(self.two(self.flat(x))[0]),
        flat=nn.Identity(),
        two=Function(lambda self, x: x.chunk(2)),
        last=Function(lambda self, x: x.sum()),
        unused=nn.ReLU(),
    )
    trace = Trace(model, (SMALL,))
    for tap in (Tap("unused"), Tap("two"), Tap("last"), Tap("flat", "input")):
        with pytest.raises(ValueError, match=f"no single feature tensor .* at the {tap.side} of '{tap.module}'"):
            tapped_operation(trace, model, tap)


def test_channel_axis_of_a_tap() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2))
    trace = Trace(model, (SMALL,))
    assert tapped_operation(trace, model, Tap("1")).channels == 5
    assert tapped_operation(trace, model, Tap("1", channel_dim=2)).channels == 1024
    assert tapped_operation(trace, model, Tap("1", channel_dim=-1)).spatial == (5,)
    for wrong in (0, 3, -3, -4):
        with pytest.raises(ValueError, match=f"channel_dim={wrong} of tap 1:output .* expected 1 to 2"):
            tapped_operation(trace, model, Tap("1", channel_dim=wrong))

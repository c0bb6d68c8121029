"""How networks want their images, held to timm's and torchvision's own transforms."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from matchdistill.models import Preparation, build_model, small_resnet
from matchdistill.models.build import SOURCES, Source, find_preparation
from matchdistill.models.preparation import IMAGENET, convert_images, preparation_problems
from matchdistill.models.pretrained import Wanted

CLIP = Preparation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", 0.9)
HALF = Preparation((0.5,) * 3, (0.5,) * 3, "bicubic", 0.95, "squash")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 131, 3), dtype=np.uint8))


def of_timm(name, size=None):
    """timm's own validation transform of pretrained weights."""
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    return timm.data.create_transform(**{**config, **({} if size is None else {"input_size": (3, size, size)})})


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("resnet18.a1_in1k", False),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", True),
        ("vit_base_patch16_clip_224.openai", True),
        ("vit_base_patch16_siglip_224.webli", True),  # squashed
        ("nfnet_l0.ra2_in1k", False),
        ("vit_large_patch14_clip_224.datacompxl", True),
        ("eva02_base_patch14_448.mim_in22k_ft_in22k", True),
    ],
)
def test_timm_sees_the_same(name, fixed):
    found = find_preparation(f"timm:{name}", "pretrained", {})
    preparation = Preparation.of(found.values)
    assert found.fixed == fixed
    transform = of_timm(name)
    crops = transform.transforms[:-2]
    assert tuple(map(float, preparation.mean)) == pytest.approx(transform.transforms[-1].mean.tolist())
    assert tuple(map(float, preparation.std)) == pytest.approx(transform.transforms[-1].std.tolist())
    expected = ours = PICTURE
    for step in crops:
        expected = step(expected)
    for step in preparation.cut(preparation.size):
        ours = step(ours)
    assert np.array_equal(expected, ours)


def test_a_border_around_the_picture():
    preparation = Preparation(HALF.mean, HALF.std, "bicubic", 1.15, "border")
    transform = timm.data.create_transform(**preparation.words(64))
    expected = ours = PICTURE
    for step in transform.transforms[:-2]:
        expected = step(expected)
    for step in preparation.cut(64):
        ours = step(ours)
    assert np.array_equal(expected, ours)


@pytest.mark.parametrize(
    ("name", "weights", "fixed"),
    [
        ("resnet50", "IMAGENET1K_V1", False),
        ("resnet50", "IMAGENET1K_V2", False),
        ("resnet50", "pretrained", False),
        ("efficientnet_b3", "DEFAULT", False),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", True),
        ("inception_v3", "DEFAULT", False),
    ],
)
def test_torchvision_sees_the_same(name, weights, fixed):
    choices = torchvision.models.get_model_weights(name)
    transform = (choices.DEFAULT if weights in ("DEFAULT", "pretrained") else choices[weights]).transforms()
    found = find_preparation(f"torchvision:{name}", weights, {})
    preparation = Preparation.of(found.values)
    assert (found.fixed, preparation.size) == (fixed, transform.crop_size[0])
    ours = PICTURE
    for step in preparation.cut(preparation.size):
        ours = step(ours)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
    pixels = torch.from_numpy(np.array(ours)).permute(2, 0, 1) / 255
    torch.testing.assert_close((pixels - mean) / std, transform(PICTURE), rtol=0, atol=1e-5)


def test_what_is_not_known():
    for name, weights in [
        ("torchvision:fasterrcnn_resnet50_fpn", "DEFAULT"),  # which normalises images itself
        ("torchvision:nothing", "DEFAULT"),
        ("torchvision:resnet18", "IMAGENET1K_V9"),
        ("timm:nothing", "pretrained"),
        ("timm:resnet18", "a9_in1k"),
        ("matchdistill.models:small_resnet", "pretrained"),
    ]:
        assert find_preparation(name, weights, {}) is None
    assert set(find_preparation("torchvision:fcn_resnet50", "DEFAULT", {}).values) == {"mean", "std", "interpolation"}


def test_options_of_the_network_count():
    wanted = find_preparation("timm:vit_tiny_patch16_224", "pretrained", {"img_size": 96})
    assert (wanted.values["size"], wanted.fixed) == (96, True)
    assert not find_preparation("timm:vit_tiny_patch16_224", "pretrained", {"dynamic_img_size": True}).fixed
    overlay = {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3)}}
    assert find_preparation("timm:resnet18", "pretrained", overlay).values["mean"] == [0.1, 0.2, 0.3]


def test_another_source_says_its_own(monkeypatch):
    def wants(entry, weights, options):
        return Wanted({"mean": [0.1, 0.1, 0.1], "size": options["size"]}, fixed=True) if weights == "own" else None

    monkeypatch.setitem(SOURCES, "zoo", Source(lambda: ["net"], lambda *_: nn.Identity(), wants=wants))
    assert find_preparation("zoo:net", "own", {"size": 9}) == Wanted({"mean": [0.1, 0.1, 0.1], "size": 9}, True)
    monkeypatch.setitem(SOURCES, "quiet", Source(lambda: ["net"], lambda *_: nn.Identity()))
    assert find_preparation("quiet:net", "own", {}) is None
    assert isinstance(build_model("quiet:net"), nn.Identity)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"means": 1}, "p has no 'means'; did you mean 'mean'?: expected mean, std, interpolation"),
        ({"mean": 0.5}, "p.mean is 0.5: expected three numbers, of values from 0 to 1"),
        ({"mean": [0.5, 0.5]}, "p.mean is [0.5, 0.5]: expected three numbers"),
        ({"mean": ["a", 0, 0]}, "p.mean is ['a', 0, 0]: expected three numbers"),
        (
            {"mean": [124, 116, 104]},
            "p.mean is [124, 116, 104]: expected numbers of values from 0 to 1, divide them by 255",
        ),
        ({"mean": [float("nan"), 0, 0]}, "p.mean is [nan, 0, 0]: expected three finite numbers"),
        ({"std": [0.5, 0.5, 0]}, "p.std is [0.5, 0.5, 0]: expected three numbers above 0"),
        ({"interpolation": "bicubik"}, "p.interpolation is 'bicubik'; did you mean 'bicubic'"),
        ({"crop_mode": None}, "p.crop_mode is None: expected one of center, squash, border"),
        ({"crop_pct": "all"}, "p.crop_pct is 'all': expected a share"),
        ({"crop_pct": 0}, "p.crop_pct is 0: expected a finite number of more than 0"),
        ({"crop_pct": 87.5}, "p.crop_pct is 87.5: expected a share of at most 1"),
        ({"size": [224, 224]}, "p.size is [224, 224]: expected a number of pixels"),
        ({"size": 0}, "p.size is 0: expected a whole number from 1"),
    ],
)
def test_bad_values(values, problem):
    (found,) = preparation_problems("p", values)
    assert found.startswith(problem)
    assert "\n" not in found
    with pytest.raises(ValueError, match="preparation"):
        Preparation.of(values)


def test_values_come_back():
    for preparation in (IMAGENET, CLIP, HALF):
        assert Preparation.of(preparation.plain()) == preparation
    assert Preparation.of({"mean": [0, 0, 0]}) == Preparation(mean=(0.0, 0.0, 0.0))
    assert [preparation.usual for preparation in (IMAGENET, Preparation(size=224), Preparation(size=160), CLIP)] == [
        True,
        True,
        False,
        False,
    ]


class Recording(nn.Module):
    """Gives its images back."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, other=None):
        return images


def normalised(pixels, preparation):
    return torchvision.transforms.Normalize(preparation.mean, preparation.std)(pixels)


@pytest.mark.parametrize("given", [IMAGENET, CLIP, HALF])
@pytest.mark.parametrize("wanted", [IMAGENET, CLIP, HALF, Preparation((0.0,) * 3, (1.0,) * 3)])
def test_the_same_pixels_another_way(given, wanted):
    pixels = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    network = Recording()
    convert_images(network, given, wanted)
    images = normalised(pixels, given)
    kept = images.clone()
    for each in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(each(images), normalised(pixels, wanted), rtol=0, atol=1e-5)
    assert torch.equal(images, kept)  # the student's
    assert list(network.state_dict()) == ["weight"]
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        assert network(images) is images
        assert not network._forward_pre_hooks
    ordered = images.to(memory_format=torch.channels_last)
    assert network(ordered).is_contiguous(memory_format=torch.channels_last)


def test_one_fused_operation():
    network = Recording()
    convert_images(network, IMAGENET, CLIP)
    images = torch.randn(2, 3, 8, 8)
    with torch.profiler.profile() as profile, torch.no_grad():
        network(images)
    assert [event.key for event in profile.key_averages() if event.key.startswith("aten::")] == ["aten::addcmul"]


def test_another_size():
    network = Recording()
    convert_images(network, Preparation(size=16), Preparation(HALF.mean, HALF.std, size=24))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    resized = torchvision.transforms.v2.functional.resize(pixels, [24, 24], antialias=True)
    torch.testing.assert_close(network(normalised(pixels, IMAGENET)), normalised(resized, HALF), rtol=0, atol=1e-5)
    assert network(torch.zeros(1, 3, 24, 24)).shape == (1, 3, 24, 24)
    same = Recording()
    convert_images(same, Preparation(size=16), Preparation(size=16))
    assert not same._forward_pre_hooks


def test_a_compiled_network_computes_the_same():
    network = small_resnet(width=2).eval()
    convert_images(network, IMAGENET, HALF)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)

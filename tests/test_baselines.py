"""The other distillers of features: each loss against its formula in loops, and who owns what.

Axes: N images, Cs student channels, Ct teacher channels, H and W positions.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
from matchdistill.baselines import AttentionPosition, FitNetsPosition, OverhaulPosition, attention
from matchdistill.features import FeatureDistiller
from networks import PLAIN_TAPS, Plain, as_if_trained, losses_of_garbage
from test_distiller import PATCH_TAPS, assert_padding_is_left_out, padded, patches

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

BASELINES = {"fitnets": FitNetsPosition, "at": AttentionPosition, "ofd": OverhaulPosition}


def ready(name: str, weight: float = 1.0, teacher: int = 8, student: int = 4) -> FeatureDistiller:
    torch.manual_seed(0)
    networks = as_if_trained(Plain(teacher)), as_if_trained(Plain(student))
    return FeatureDistiller(*networks, PLAIN_TAPS, BASELINES[name], loss_weight=weight, example=IMAGES)


def values(distiller: FeatureDistiller) -> tuple[Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """The loss of a pass, and the tapped (student, teacher) features."""
    with distiller.capture() as captured:
        distiller.student(IMAGES)
    teacher = distiller._teacher(captured)
    pairs = [(captured.values[n].detach().double().numpy(), teacher[n].double().numpy()) for n in range(3)]
    return distiller.loss(captured), pairs


def adapted(student: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A 1x1 convolution."""
    out = np.zeros((len(student), len(weight), *student.shape[2:]))
    for n, row, column in np.ndindex(len(student), *student.shape[2:]):
        for channel in range(len(weight)):
            out[n, channel, row, column] = sum(weight[channel] * student[n, :, row, column])
            out[n, channel, row, column] += 0 if bias is None else bias[channel]
    return out


def double(parameter: Tensor) -> np.ndarray:
    return parameter.detach().double().numpy()


def rectified(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 0)


def test_fitnets_is_the_mean_squared_distance_of_activations_behind_its_adapter():
    distiller = ready("fitnets", weight=3.0)
    loss, pairs = values(distiller)
    expected = 0.0
    for (student, teacher), position in zip(pairs, distiller.positions, strict=True):
        adapter = position.adapter
        mapped = adapted(rectified(student), double(adapter.weight), double(adapter.bias))
        expected += 3 * np.mean((rectified(mapped) - rectified(teacher)) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_attention_is_the_squared_distance_of_unit_maps():
    distiller = ready("at", weight=1000.0)
    loss, pairs = values(distiller)
    expected = 0.0
    for student, teacher in pairs:
        maps = []
        for features in (student, teacher):
            powers = np.zeros((len(features), features[0, 0].size))
            for n, place in np.ndindex(*powers.shape):
                powers[n, place] = sum(max(v, 0.0) ** 2 for v in features[n].reshape(features.shape[1], -1)[:, place])
            maps.append(np.stack([oracles.unit_vector(row) for row in powers]))
        expected += 1000 * np.mean(np.sum((maps[0] - maps[1]) ** 2, axis=1))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_attention_of_dead_features_is_zero_and_finite():
    features = torch.full((2, 3, 4, 4), -1.0, requires_grad=True)
    maps = attention(features)
    maps.sum().backward()
    assert maps.shape == (2, 16)
    assert not maps.any()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_is_summed_in_full(name, dtype):
    """Large features of half precision lose what they lost as such, and nothing more."""
    position = ready(name).positions[0]
    generator = torch.Generator().manual_seed(1)
    student, teacher = (300 * torch.randn(4, width, 8, 8, generator=generator) for width in (4, 8))
    whole = position.loss(student.to(dtype).float(), teacher.to(dtype).float(), "mean")
    half = position.to(dtype).loss(student.to(dtype), teacher.to(dtype), "mean")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=1e-6 if name == "at" else 0.03, atol=0)


def test_overhaul_is_the_partial_distance_behind_adapter_and_norm():
    distiller = ready("ofd", weight=2.0)
    loss, pairs = values(distiller)
    expected = 0.0
    for number, ((student, teacher), position) in enumerate(zip(pairs, distiller.positions, strict=True)):
        mapped = adapted(student, double(position.adapter.weight), None)
        mean, variance = mapped.mean((0, 2, 3), keepdims=True), mapped.var((0, 2, 3), keepdims=True)
        mapped = (mapped - mean) / np.sqrt(variance + position.norm.eps)
        norm = distiller.teacher.get_submodule(f"bn{number}")
        margin = oracles.batchnorm_margin(double(norm.weight), double(norm.bias))
        expected += 2 * oracles.partial_loss(mapped, teacher, margin, "mean")
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize(("name", "channels"), [("fitnets", (8, 16)), ("at", None), ("ofd", (8, 16))])
def test_padding_is_left_out(name, channels, kind):
    def make(**options):
        torch.manual_seed(0)
        networks = patches(8), patches(4)
        return FeatureDistiller(*networks, PATCH_TAPS, BASELINES[name], example=padded()[1], **options)

    assert_padding_is_left_out(make, kind, channels)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_beside_the_images_reaches_a_masked_loss(name):
    position = ready(name).positions[0].train()
    generator = torch.Generator().manual_seed(1)
    own, others = (torch.randn(4, width, 8, 8, generator=generator) for width in (4, 8))
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[0], mask[1, :5, :6], mask[2, :1, :1] = True, True, True  # and none of the last
    found = []
    for loss, gradients in losses_of_garbage(position, own, others, mask):
        assert not gradients[0].masked_select(~mask[:, None]).any()
        found.append([loss, *gradients])
    assert all(value.isfinite().all() for value in found[0])
    assert found[0][0] > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_overhaul_takes_its_margins_from_the_teacher_as_it_is_now():
    distiller = ready("ofd")
    before = values(distiller)[0].item()
    with torch.no_grad():
        for number in range(3):
            distiller.teacher.get_submodule(f"bn{number}").bias.fill_(-50.0)
    assert not math.isclose(values(distiller)[0].item(), before, rel_tol=1e-3)


def test_overhaul_needs_batch_norms():
    torch.manual_seed(0)
    teacher = Plain(8)
    for number in range(3):
        setattr(teacher, f"bn{number}", nn.Identity())
    with pytest.raises(ValueError, match=r"relu0:input -> relu0:input: OFD takes .* before it: give taps"):
        FeatureDistiller(teacher, Plain(4), PLAIN_TAPS, BASELINES["ofd"], example=IMAGES)


@pytest.mark.parametrize("name", BASELINES)
def test_student_and_adapters_are_trained_the_teacher_is_not(name):
    distiller = ready(name)
    frozen = {key: value.clone() for key, value in distiller.teacher.state_dict().items()}
    keys = list(Plain(4).state_dict())
    owned = {id(parameter) for parameter in distiller.parameters()}
    assert not owned & {id(parameter) for parameter in distiller.teacher.parameters()}
    assert not any("teacher" in key or "_margin" in key for key in distiller.state_dict())
    _, loss = distiller(IMAGES)
    loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.positions.parameters())
    assert distiller.student.conv0.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(torch.equal(value, frozen[key]) for key, value in distiller.teacher.state_dict().items())
    assert list(distiller.release().state_dict()) == keys


@pytest.mark.parametrize("name", BASELINES)
def test_training_brings_student_and_teacher_together(name):
    distiller = ready(name)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05 if name != "at" else 1.0)
    losses = []
    for _ in range(30):
        _, loss = distiller(IMAGES)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

"""A teacher that is prepared to run faster: the same values, from less work."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matchdistill import MatchingDistiller, Tap
from matchdistill.models import build_model, small_resnet
from matchdistill.prepare import foldable, prepared
from matchdistill.teacher import FrozenTeacher
from matchdistill.trace import Trace
from networks import PLAIN_TAPS, Function, Plain, as_if_trained, conv_bn

pytestmark = pytest.mark.usefixtures("one_thread")


def images(size: int = 8, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def norms_of(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def folded(network: nn.Module, example: Tensor, *taps: Tap, **options: Any) -> nn.Module:
    return prepared(copy.deepcopy(network).eval(), foldable(Trace(network, (example,)), taps), **options)


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("torchvision:resnet18", 64, 0),
        ("torchvision:mobilenet_v2", 64, 0),
        ("torchvision:shufflenet_v2_x0_5", 64, 0),
        ("timm:mobilenetv1_100", 64, 0),  # norms with activations of their own
        ("timm:regnetx_002", 64, 0),
        ("torchvision:densenet121", 64, 62),  # norms before convolutions, which stay
        ("timm:vit_tiny_patch16_224", 224, 0),
    ],
)
def test_outputs_are_those_of_the_network(name: str, size: int, left: int) -> None:
    torch.manual_seed(0)
    network = as_if_trained(build_model(name, num_classes=5)).double().eval()
    example = images(size).double()
    fast = folded(network, example)
    assert norms_of(fast) == left
    with torch.no_grad():
        expected = network(example)
        torch.testing.assert_close(fast(example), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_convolution_and_norm(axes: int, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    convolution = getattr(nn, f"Conv{axes}d")(4, 6, 3, padding=1, groups=2, bias=bias)
    norm = getattr(nn, f"BatchNorm{axes}d")(6, affine=affine, eps=0.1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    network, example = nn.Sequential(convolution, norm).eval(), torch.randn(2, 4, *[5] * axes)
    fast = folded(network, example)
    assert norms_of(fast) == 0
    with torch.no_grad():
        torch.testing.assert_close(fast(example), network(example))


def shared(network: Function, x: Tensor) -> Tensor:
    return network.norm(network.conv(network.norm(network.conv(x))))


def used_twice(network: Function, x: Tensor) -> Tensor:
    value = network.conv(x)
    return network.norm(value) + value


def returned(network: Function, x: Tensor) -> dict[str, Tensor]:
    value = network.conv(x)
    return {"before": value, "after": network.norm(value)}


@pytest.mark.parametrize("function", [shared, used_twice, returned])
def test_what_has_other_uses_stays(function: Any) -> None:
    network = Function(function, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    assert foldable(Trace(network, (images(),))) == []


def test_norms_that_are_not_plain_stay() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    hooked = conv_bn(3, 3)
    hooked[0].register_forward_hook(lambda *_: None)
    by_batch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Own(3), hooked, by_batch, weighted, conv_bn(3, 3))
    assert foldable(Trace(network, (images(),))) == [("5.0", "5.1")]


@pytest.mark.parametrize("tap", ["conv1", "bn1:input", "conv1 + conv1:input"])
def test_a_tapped_convolution_stays(tap: str) -> None:
    trace = Trace(Plain(4), (images(),))
    assert [pair[0] for pair in foldable(trace)] == ["conv0", "conv1", "conv2"]
    assert [pair[0] for pair in foldable(trace, [Tap.parse(tap)])] == ["conv0", "conv2"]
    assert len(foldable(trace, [Tap("bn1"), Tap("relu1", "input")])) == 3


TAPS = [("bn0:output", "bn0"), ("conv1:output", "conv1"), ("relu2:input", "bn2")]


def distillers(**options: Any) -> list[MatchingDistiller]:
    """Two that differ in the preparation alone."""
    torch.manual_seed(0)
    teacher, student = (as_if_trained(Plain(width)) for width in (8, 4))
    made = []
    for prepare in (None, functools.partial(prepared, **options)):
        copies = copy.deepcopy((teacher, student))
        made.append(MatchingDistiller(*copies, TAPS, example=images(), prepare=prepare).train())
        made[-1].refresh([images(count=6)])
    return made


def losses(*made: MatchingDistiller) -> list[Tensor]:
    return [distiller(images(count=6))[1].detach() for distiller in made]


def test_distillation_is_the_same() -> None:
    plain, fast = distillers()
    for first, second in zip(plain.positions, fast.positions, strict=True):
        assert torch.equal(first.index, second.index)
        torch.testing.assert_close(first.margin, second.margin)
    torch.testing.assert_close(*losses(plain, fast))
    (copied,) = fast._teacher.copies.values()
    assert norms_of(copied.model) == 1  # behind the tapped convolution
    assert norms_of(fast.teacher) == 3
    given = images(count=6)
    with plain.capture() as captured:
        plain.student(given)
    values = [distiller._teacher(captured) for distiller in (plain, fast)]
    for number in range(3):
        torch.testing.assert_close(values[1][number], values[0][number], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close() -> None:
    plain, fast = distillers(dtype=torch.bfloat16)
    first, second = losses(plain, fast)
    assert first != second
    torch.testing.assert_close(first, second, rtol=0.05, atol=0.05)
    with fast.capture() as captured:
        fast.student(images())
    assert {value.dtype for value in fast._teacher(captured).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_compiled_and_frozen() -> None:
    plain, fast = distillers(compile=True)
    torch.testing.assert_close(*losses(plain, fast))
    torch.testing.assert_close(*losses(plain, fast))


def test_weights_that_are_loaded_later_take_effect() -> None:
    plain, fast = distillers()
    torch.manual_seed(1)
    other = as_if_trained(Plain(8)).state_dict()
    before = losses(fast)
    for distiller in (plain, fast):
        distiller.teacher.load_state_dict(other)
    torch.testing.assert_close(*losses(plain, fast))
    assert losses(fast) != before
    with torch.no_grad():
        for distiller in (plain, fast):
            distiller.teacher.bn1.bias += 1
    torch.testing.assert_close(*losses(plain, fast))


def test_it_is_prepared_once() -> None:
    _, fast = distillers()
    losses(fast)
    (first,) = fast._teacher.copies.values()
    for _ in range(2):
        losses(fast)
        fast.refresh([images()])
    assert list(fast._teacher.copies.values()) == [first]


def test_weights_that_are_replaced_past_their_versions_take_effect_at_a_refresh() -> None:
    plain, fast = distillers()
    for distiller in (plain, fast):
        distiller.teacher.bn2.weight.data = distiller.teacher.bn2.weight.data * 3
        distiller.refresh([images(count=6)])
    torch.testing.assert_close(*losses(plain, fast))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_prepared_too(copied: Any) -> None:
    plain, fast = distillers()
    torch.testing.assert_close(*losses(plain, copied(fast)))


def test_a_teacher_of_outputs_alone() -> None:
    network = small_resnet(width=2)
    example = images(16)
    teacher = FrozenTeacher(network, prepare=functools.partial(prepared, folds=foldable(Trace(network, (example,)))))
    fast = teacher.on(torch.device("cpu"))
    assert norms_of(fast.model) == 0 < norms_of(network)
    torch.testing.assert_close(fast.model(example), network(example))


def test_pairs_are_of_the_taps_of_the_plain_network() -> None:
    distiller = MatchingDistiller(Plain(8), Plain(4), PLAIN_TAPS, example=images(), prepare=prepared)
    assert [position.margin_norm for position in distiller.positions] == ["bn0", "bn1", "bn2"]

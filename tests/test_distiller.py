"""The distiller: parity with slow loops, awkward widths and sizes, and life inside other people's training code.

Axes: N images, Cs student channels, Ct teacher channels, G group, H and W positions, T tokens.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import oracles
from matchdistill import MatchingDistiller, Reduction, Tap
from matchdistill.features import FeatureDistiller
from matchdistill.functional import batchnorm_margin, matching_cost, partial_loss, reduce_channels, solve_assignment
from matchdistill.norms import FeatureNorm, group_norm
from matchdistill.refreshed import Reduced
from networks import PLAIN_TAPS, Plain, as_if_trained, conv_bn, losses_of_garbage

pytestmark = pytest.mark.usefixtures("one_thread")

REDUCTIONS = ("sm", "amp", "max", "mean")


def images(count: int = 4, seed: int = 0, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def networks(teacher: int = 8, student: int = 4, seed: int = 0, **options: Any) -> tuple[Plain, Plain]:
    torch.manual_seed(seed)
    return as_if_trained(Plain(teacher, **options)), as_if_trained(Plain(student, **options))


def ready(teacher: int = 8, student: int = 4, **options: Any) -> MatchingDistiller:
    """A distiller of two plain networks that has been matched."""
    distiller = MatchingDistiller(*networks(teacher, student), example=images(), **options)
    distiller.refresh([images(8, seed=1)])
    return distiller


def features(network: Plain, x: Tensor) -> list[Tensor]:
    """What is before each activation, computed without hooks and without in-place operations."""
    found = []
    for stage in range(3):
        found.append(network.get_submodule(f"bn{stage}")(network.get_submodule(f"conv{stage}")(x)))
        x = F.relu(found[-1])
    return found


def arrays(values: list[Tensor]) -> list[np.ndarray]:
    return [value.detach().double().numpy() for value in values]


def slow_norm(values: np.ndarray) -> np.ndarray:
    """Batch norm in training mode with a scale of 1 and a shift of 0."""
    out = np.zeros_like(values)
    for channel in range(values.shape[1]):
        flat = [float(value) for value in values[:, channel].reshape(-1)]
        mean = sum(flat) / len(flat)
        variance = sum((value - mean) ** 2 for value in flat) / len(flat)
        out[:, channel] = (values[:, channel] - mean) / (variance + 1e-5) ** 0.5
    return out


class Slow:
    """The method on two plain networks from the oracles."""

    def __init__(self, teacher: Plain, student: Plain, reduction: str, batches: list[Tensor]) -> None:
        self.teacher, self.student, self.reduction = teacher.eval(), student.eval(), reduction
        maps = [[arrays(features(network, batch)) for batch in batches] for network in (student, teacher)]
        self.costs, self.indices, self.margins = [], [], []
        for stage in range(3):
            own, others = (np.concatenate([found[stage] for found in network]) for network in maps)
            self.costs.append(oracles.matching_cost(own, others))
            group = 1 if reduction == "sm" else oracles.default_group_size(own.shape[1], others.shape[1])
            self.indices.append(oracles.balanced_assignment(self.costs[-1], group))
            norm = teacher.get_submodule(f"bn{stage}")
            margin = oracles.batchnorm_margin(*arrays([norm.weight, norm.bias]))
            self.margins.append(margin)

    def losses(self, x: Tensor, kind: str) -> list[float]:
        """Of every position, with the student in training mode."""
        found = []
        own = arrays(features(self.student.train(), x))
        others = arrays(features(self.teacher, x))
        for maps, target, index, margin in zip(own, others, self.indices, self.margins, strict=True):
            guided = index[:, 0] >= 0
            reduced = oracles.reduce_channels(target, index[guided], self.reduction)
            floor = oracles.reduce_margin(margin, index[guided], self.reduction)
            found.append(oracles.partial_loss(slow_norm(maps)[:, guided], reduced, floor, kind))
        return found


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("widths", [(8, 4), (7, 3), (3, 5)])
def test_parity_with_the_oracles(widths: tuple[int, int], reduction: str) -> None:
    """Widths that divide, that do not, and a narrower teacher."""
    teacher, student = (network.double() for network in networks(*widths))
    batches, x = [images(2, seed=1).double(), images(3, seed=2).double()], images(3, seed=3).double()
    slow = Slow(*copy.deepcopy((teacher, student)), reduction, batches)
    distiller = MatchingDistiller(teacher, student, PLAIN_TAPS, reduction, loss_weight=[3, 2, 1], example=x)
    matchings = distiller.refresh(batches)
    for stage, (matching, position) in enumerate(zip(matchings, distiller.positions, strict=True)):
        np.testing.assert_allclose(matching.cost.numpy(), slow.costs[stage], rtol=1e-6)
        assert matching.index.tolist() == slow.indices[stage].tolist() == position.index.tolist()
        guided = slow.indices[stage][:, 0] >= 0
        margins = oracles.reduce_margin(slow.margins[stage], slow.indices[stage][guided], reduction)
        np.testing.assert_allclose(position.margin.numpy()[guided], margins, rtol=1e-6)
        assert not position.margin[~torch.from_numpy(guided)].any()
        assert matching.images == 5
        assert matching.churn is None
    distiller.train()
    output, loss = distiller(x)
    weighted = [weight * value for weight, value in zip((3, 2, 1), slow.losses(x, "mean"), strict=True)]
    np.testing.assert_allclose(distiller.position_losses.numpy(), weighted, rtol=1e-6)
    assert loss.item() == pytest.approx(sum(weighted), rel=1e-6)
    torch.testing.assert_close(output, copy.deepcopy(student).train()(x))


@pytest.mark.parametrize(("widths", "reduction"), [((8, 4), "amp"), ((7, 3), "max"), ((3, 5), "amp"), ((8, 4), "sm")])
def test_gradients_are_the_oracles_differences(widths: tuple[int, int], reduction: str) -> None:
    teacher, student = (network.double() for network in networks(*widths))
    batches, x = [images(4, seed=1).double()], images(2, seed=3, size=6).double()
    slow = Slow(*copy.deepcopy((teacher, student)), reduction, batches)
    distiller = MatchingDistiller(teacher, student, PLAIN_TAPS, reduction, loss_weight=1, example=x)
    distiller.refresh(batches)
    distiller.train()(x)[1].backward()
    generator, step = torch.Generator().manual_seed(0), 1e-6
    for name in ("conv0.weight", "bn0.weight", "bn0.bias", "conv1.weight", "bn1.bias", "conv2.weight"):
        gradient = student.get_parameter(name).grad
        assert gradient is not None
        place = tuple(int(torch.randint(size, (), generator=generator)) for size in gradient.shape)
        parameter = slow.student.get_parameter(name)
        sides = []
        for shift in (step, -2 * step):
            with torch.no_grad():
                parameter[place] += shift
            sides.append(sum(slow.losses(x, "mean")))
        with torch.no_grad():
            parameter[place] += step
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-7)
    assert student.fc.weight.grad is None


def test_random_drop_repeats_with_torch_s_seed() -> None:
    distiller = ready(reduction="rd")
    teacher = distiller.teacher
    taken = [position.margin.tolist() for position in distiller.positions]
    for stage, position in enumerate(distiller.positions):
        norm = teacher.get_submodule(f"bn{stage}")
        allowed = batchnorm_margin(norm.weight, norm.bias)[position.index]
        assert all(margin in row for margin, row in zip(taken[stage], allowed.tolist(), strict=True))
    distiller.eval()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(distiller(images())[1].item())
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(3)
    own, others = features(distiller.student.eval(), images()), features(teacher, images())
    expected = 0.0
    for position, student, target in zip(distiller.positions, own, others, strict=True):
        reduced = reduce_channels(target, position.index, "rd")
        expected += 5 * partial_loss(position.norm(student), reduced, position.margin, "mean").item()
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_random_margins_differ_between_refreshes() -> None:
    distiller = ready(reduction="rd")
    before = distiller.positions[2].margin.clone()
    distiller.refresh([images(8, seed=1)])
    assert not torch.equal(distiller.positions[2].margin, before)


def test_a_reduction_of_the_user_s_own() -> None:
    smallest = Reduction(lambda maps, index, _: maps[:, index].amin(2), lambda margins, _: margins.amin(1))
    distiller = ready(reduction=smallest)
    teacher, student = distiller.teacher, distiller.student.eval()
    position = distiller.eval().positions[1]
    distiller(images())
    target = features(teacher, images())[1][:, position.index].amin(2)
    value = partial_loss(position.norm(features(student, images())[1]), target, position.margin, "mean")
    torch.testing.assert_close(distiller.position_losses[1], 5 * value.detach())


@pytest.mark.parametrize("count", [1, 3])
def test_loss_of_the_paper(count: int) -> None:
    distiller = ready(loss_weight="paper").eval()
    means = ready(loss_weight=1).eval()
    loss = distiller(images(count))[1]
    means(images(count))
    sizes = [
        count * position.student_channels * area for position, area in zip(means.positions, (64, 16, 4), strict=True)
    ]
    sums = [mean * size for mean, size in zip(means.position_losses.tolist(), sizes, strict=True)]
    expected = oracles.total_loss(0.0, sums, oracles.paper_loss_weights(3, count))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_five_times_the_mean_is_the_paper_s_loss_for_mobilenet_v1_at_224() -> None:
    """Channels 128 to 1024 at 56 to 7 px: 1 / (1e4 * 2^(3-i)) of the sums per image."""
    for number, (channels, side) in enumerate([(128, 56), (256, 28), (512, 14), (1024, 7)]):
        assert channels * side * side / (1e4 * 2 ** (3 - number)) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("weight", [2, 2.0, np.float32(2), [2, 2, 2], (2.0, 2, np.float64(2))])
def test_weights_of_the_means(weight: Any) -> None:
    expected, found = ready(loss_weight=1).eval(), ready(loss_weight=weight).eval()
    torch.testing.assert_close(found(images())[1], 2 * expected(images())[1])
    torch.testing.assert_close(ready().eval()(images())[1], 5 * expected(images())[1])


def test_losses_of_the_positions() -> None:
    distiller = ready(loss_weight=[1, 0, 3])
    loss = distiller(images())[1]
    assert distiller.position_losses.shape == (3,)
    assert not distiller.position_losses.requires_grad
    torch.testing.assert_close(distiller.position_losses.sum(), loss.detach())
    assert (distiller.position_losses > 0).tolist() == [True, False, True]


def test_only_the_student_learns() -> None:
    distiller = ready()
    output, loss = distiller.train()(images())
    (loss + output.sum()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(parameter.requires_grad for parameter in distiller.teacher.parameters())


def test_channels_that_a_narrow_teacher_does_not_reach_are_left_alone() -> None:
    distiller = ready(3, 8)
    with distiller.capture() as captured:
        distiller.student(images())
    for value in captured.values.values():
        value.retain_grad()
    distiller.loss(captured).backward()
    for number, position in enumerate(distiller.positions):
        guided = position.index[:, 0] >= 0
        assert guided.sum() == 3 * 2**number
        assert sorted(position.index[guided].flatten().tolist()) == list(range(3 * 2**number))
        moved = captured.values[number].grad.abs().sum((0, 2, 3)) > 0
        if number == 2:  # the last position hears of no other loss
            assert torch.equal(moved, guided)
        norm = position.norm.bias.grad != 0
        assert not norm[~guided].any()
        assert norm[guided].any()


def test_every_teacher_channel_can_be_matched_where_widths_do_not_divide() -> None:
    """The best partner of the first student channel is the teacher's last channel."""
    teacher, student = (nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.Identity()) for width in (5, 2))
    with torch.no_grad():
        student[0].weight[0] = 3 * teacher[0].weight[4]
        student[0].weight[1] = teacher[0].weight[0]
    distiller = MatchingDistiller(teacher, student, [("0", "0")], "sm", example=images())
    (matching,) = distiller.refresh([images()])
    assert matching.index.tolist() == [[4], [0]]
    distiller = MatchingDistiller(teacher, student, [("0", "0")], example=images())
    assert 4 in distiller.refresh([images()])[0].index[0]


def one_position(teacher: Tensor, student: Tensor, **options: Any) -> MatchingDistiller:
    """A distiller whose networks return these features, whatever the input, times a weight of 1."""

    class Constant(nn.Module):
        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.scale, self.value = nn.Parameter(torch.ones(())), value

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.value[: len(x)] + 0 * x.mean()

    made = [nn.Sequential(Constant(value), nn.Identity()) for value in (teacher, student)]
    return MatchingDistiller(*made, taps=[("0", "0")], example=images(len(student)), **options)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("teacher", "student", "seen"),
    [
        ((4, 6, 8, 8), (4, 3, 4, 4), lambda maps: F.avg_pool2d(maps, 2)),
        ((4, 6, 4, 4), (4, 3, 8, 8), lambda maps: F.interpolate(maps, (8, 8), mode="bilinear")),
        ((4, 6, 4, 8), (4, 3, 8, 4), lambda maps: F.interpolate(maps, (8, 4), mode="bilinear")),
        ((4, 17, 6), (4, 3, 4, 4), lambda rows: rows[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)),
        ((4, 17, 6), (4, 3, 2, 2), lambda rows: F.avg_pool2d(rows[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), 2)),
        ((4, 6, 4, 4), (4, 17, 3), lambda maps: maps),
        ((4, 17, 6), (4, 17, 3), lambda rows: rows.transpose(1, 2)),
        ((4, 18, 6), (4, 17, 3), lambda rows: rows[:, 2:].transpose(1, 2).unflatten(2, (4, 4))),
        ((4, 6), (4, 3), lambda vectors: vectors.T[None]),
    ],
)
def test_other_map_sizes_and_tokens(teacher: Any, student: Any, seen: Callable[[Tensor], Tensor]) -> None:
    own, others = random_maps(*student), random_maps(*teacher, seed=1)
    distiller = one_position(others, own)
    distiller.refresh([images()])
    target = seen(others)
    second = own.transpose(1, 2) if own.ndim == 3 else own
    if own.ndim == 2:  # a pooled channel is told from others by the images of the batch
        second = own.T[None]
    if second.shape[2:] != target.shape[2:]:
        second = second[:, :, 1:].unflatten(2, (4, 4))
    (position,) = distiller.positions
    cost = matching_cost(second, target)
    torch.testing.assert_close(position.matching.cost.float(), cost, rtol=1e-4, atol=1e-5)
    assert torch.equal(position.index, solve_assignment(cost))
    distiller.train()
    loss = distiller(images())[1]
    normalised = F.batch_norm(second, None, None, training=True)
    expected = partial_loss(normalised, reduce_channels(target, position.index), position.margin, "mean")
    torch.testing.assert_close(loss.detach(), 5 * expected, rtol=1e-4, atol=1e-6)


def test_channels_last_of_a_tap_by_hand() -> None:
    """Maps (N, H, W, C) from an operation that hides where the channels are."""
    own, others = random_maps(4, 5, 5, 3), random_maps(4, 5, 5, 6, seed=1)
    made = [nn.Sequential(conv_bn(3, 2), Stub(value)) for value in (others, own)]
    taps = [(Tap("1", channel_dim=3), Tap("1", channel_dim=-1))]
    distiller = MatchingDistiller(*made, taps=taps, example=images(4, size=5))
    (matching,) = distiller.refresh([images(4, size=5)])
    assert (distiller.positions[0].teacher_channels, distiller.positions[0].student_channels) == (6, 3)
    torch.testing.assert_close(matching.cost.float(), matching_cost(own.movedim(3, 1), others.movedim(3, 1)))
    assert distiller(images(4, size=5))[1].isfinite()


class Stub(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.value[number] + 0 * x.mean() for number in range(len(x))])


def test_zero_maps_and_constant_channels() -> None:
    own, others = random_maps(4, 3, 4, 4), random_maps(4, 6, 4, 4, seed=1)
    own[:, 0], own[:, 1] = 0, 2.5
    others[:, 3], others[:, 4] = 0, -1
    distiller = one_position(others, own)
    (matching,) = distiller.refresh([images()])
    assert matching.cost.isfinite().all()
    torch.testing.assert_close(matching.cost[0], torch.full((6,), 2.0))
    torch.testing.assert_close(matching.cost[:, 3], torch.full((3,), 2.0))
    assert sorted(matching.index.flatten().tolist()) == list(range(6))
    for training in (True, False):
        loss = distiller.train(training)(images())[1]
        distiller.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())


@pytest.mark.parametrize("side", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
def test_batch_of_one(training: bool, side: int) -> None:
    """With 1 x 1 maps there is nothing to normalise by."""
    distiller = one_position(random_maps(1, 6, side, side), random_maps(1, 3, side, side, seed=1))
    distiller.refresh([images(1)])
    distiller.train(training)
    for _ in range(2):
        loss = distiller(images(1))[1]
        assert loss.isfinite()
        assert loss > 0
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())
    (norm,) = (position.norm for position in distiller.positions)
    assert norm.running_var.isfinite().all()


def test_batch_of_one_through_networks() -> None:
    distiller = ready()
    loss = distiller.train()(images(1))[1]
    assert loss.isfinite()
    loss.backward()


def test_positions_that_are_left_out() -> None:
    everything, some = ready(taps=PLAIN_TAPS), ready(taps=[PLAIN_TAPS[0], PLAIN_TAPS[1]])
    for distiller in (everything, some):
        distiller.train()(images())[1].backward()
    torch.testing.assert_close(some.position_losses, everything.position_losses[:2])
    assert some.student.conv2.weight.grad is None
    assert everything.student.conv2.weight.grad is not None


def test_a_loss_with_nothing_to_compare_is_a_zero_in_the_graph() -> None:
    distiller = one_position(torch.full((4, 2, 2, 2), -1.0), torch.full((4, 2, 2, 2), -9.0)).eval()
    distiller.refresh([images()])
    loss = distiller(images())[1]
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in distiller.parameters())


SIZES = ((8, 8), (4, 6), (2, 8))  # of three images that are padded to one batch
PATCH_TAPS = [("2:input", "2:input"), ("5:input", "5:input")]


def patches(width: int, normed: bool = True) -> nn.Sequential:
    """Every value is of one pixel, then of a square of four: what is beside an image does not reach its features."""
    second = nn.BatchNorm2d(2 * width) if normed else nn.Conv2d(2 * width, 2 * width, 1)
    first = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU()
    return as_if_trained(nn.Sequential(*first, nn.Conv2d(width, 2 * width, 2, 2), second, nn.ReLU())).double()


def padded(garbage: float = 50.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Images of three sizes, the batch of them filled up with something, and its mask."""
    crops = [random_maps(1, 3, *size, seed=number).double() for number, size in enumerate(SIZES)]
    batch, mask = garbage * random_maps(3, 3, 8, 8, seed=9).double(), torch.zeros(3, 8, 8, dtype=torch.bool)
    for number, (crop, (height, width)) in enumerate(zip(crops, SIZES, strict=True)):
        batch[number, :, :height, :width], mask[number, :height, :width] = crop[0], True
    return crops, batch, mask


def assert_padding_is_left_out(
    make: Callable[..., FeatureDistiller], kind: Literal["mean", "sum"], channels: tuple[int, int] | None
) -> None:
    """Loss and gradients of a padded batch are those of its images, each run alone.

    `channels` is how many are compared at each position; None: an image is one value there.
    """
    crops, batch, mask = padded()
    distiller = make(loss_weight=[3, 2], loss_reduction=kind).eval()
    with distiller.capture() as captured:
        distiller.student(batch)
    loss = distiller.loss(captured, mask)
    loss.backward()
    areas = [sum(height * width for height, width in SIZES) / step for step in (1, 4)]
    elements = [1.0, 1.0]
    if kind == "mean" and channels is not None:
        elements = [count * area / 3 for count, area in zip(channels, areas, strict=True)]
    weights = [weight / count for weight, count in zip((3, 2), elements, strict=True)]
    alone = make(loss_weight=weights, loss_reduction="sum").eval()
    alone.load_state_dict(distiller.state_dict())
    expected = sum(alone(crop)[1] for crop in crops) / 3
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for found, other in zip(distiller.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert any(parameter.grad.any() for parameter in distiller.student.parameters())
    torch.testing.assert_close(distiller.position_losses.sum(), loss.detach())


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize(("widths", "reduction"), [((8, 4), "amp"), ((7, 3), "mean"), ((3, 5), "max"), ((8, 4), "sm")])
def test_padding_is_left_out(widths: tuple[int, int], reduction: str, kind: Literal["mean", "sum"]) -> None:
    """Of the matching, the margins (by a norm and measured), the loss and its gradients."""
    crops, batch, mask = padded()

    def make(**options: Any) -> MatchingDistiller:
        torch.manual_seed(0)
        networks = patches(widths[0], normed=False), patches(widths[1])
        distiller = MatchingDistiller(*networks, PATCH_TAPS, reduction, example=batch, **options)
        distiller.refresh([batch], forward=lambda images: (distiller.student(images), mask)[1])
        return distiller

    distiller = make()
    teacher, student = distiller.teacher.eval(), distiller.student.eval()
    for position, end in zip(distiller.positions, (2, 5), strict=True):
        own, others = ([network[:end](crop) for crop in crops] for network in (student, teacher))
        cost = np.mean([oracles.matching_cost(*arrays(list(pair))) for pair in zip(own, others, strict=True)], 0)
        np.testing.assert_allclose(position.matching.cost.numpy(), cost, atol=1e-6)
        group = 1 if reduction == "sm" else oracles.default_group_size(*cost.shape)
        index = oracles.balanced_assignment(cost, group)
        assert position.index.tolist() == index.tolist()
        assert position.matching.images == 3
        values = np.concatenate([value.reshape(1, value.shape[1], -1) for value in arrays(others)], 2)
        measured = position.margin_norm is None
        margin = (
            oracles.empirical_margin(values)
            if measured
            else oracles.batchnorm_margin(*arrays([*teacher[1].parameters()]))
        )
        guided = index[:, 0] >= 0
        expected = oracles.reduce_margin(margin, index[guided], reduction)
        np.testing.assert_allclose(position.margin.numpy()[guided], expected, rtol=1e-6)
    assert [position.margin_norm for position in distiller.positions] == ["1", None]
    assert_padding_is_left_out(make, kind, (min(widths), 2 * min(widths)))


@pytest.mark.parametrize("norm", [FeatureNorm, group_norm])
def test_nothing_beside_the_images_reaches_a_masked_loss(norm: Callable[[int], nn.Module]) -> None:
    """The norm, in training mode too, takes it for zeros."""
    _, batch, mask = padded()
    distiller = MatchingDistiller(patches(8), patches(4), PATCH_TAPS, norm=norm, example=batch)
    distiller.refresh([batch])
    position = distiller.positions[0].train()
    own, others = random_maps(3, 4, 8, 8).double(), random_maps(3, 8, 8, 8, seed=1).double()
    own.masked_fill_(~mask[:, None], 0)
    target = oracles.reduce_channels(others.numpy(), position.index.numpy(), "amp")
    axes = (2, 3) if norm is group_norm else (0, 2, 3)  # 4 groups of a channel each
    mean, variance = own.mean(axes, keepdim=True), own.var(axes, unbiased=False, keepdim=True)
    normalised = ((own - mean) / (variance + 1e-5).sqrt()).numpy()
    expected = oracles.partial_loss(normalised, target, position.margin.double().numpy(), "mean", mask.numpy())
    gradients = []
    for loss, found in losses_of_garbage(position, own, others, mask):
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert not found[0].masked_select(~mask[:, None]).any()
        gradients.append(found)
    assert all(value.isfinite().all() for value in position.state_dict().values())
    assert gradients[0][0].any()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)


def test_a_mask_that_is_all_true_changes_nothing() -> None:
    distiller = ready().eval()
    mask = torch.ones(4, 8, 8, dtype=torch.bool)
    with distiller.capture() as captured:
        distiller.student(images())
    torch.testing.assert_close(distiller.loss(captured, mask), distiller.loss(captured))
    again = ready()
    found = again.refresh([images()], forward=lambda batch: (again.student(batch), mask)[1])
    for matching, expected in zip(found, distiller.refresh([images()]), strict=True):
        torch.testing.assert_close(matching.cost, expected.cost)


def test_teacher_maps_of_another_size_with_a_mask() -> None:
    """The teacher's cells beside an image do not reach the student's that are half of them."""
    own, others = random_maps(2, 3, 4, 4), random_maps(2, 6, 8, 8, seed=1)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[1, :, 5:] = False
    losses, costs = [], []
    for garbage in (0.0, torch.nan):
        filled = others.masked_fill(~mask[:, None], garbage)
        distiller = one_position(filled, own, norm=lambda channels: nn.Identity())
        run = distiller.student
        (matching,) = distiller.refresh([images(2)], forward=lambda batch, run=run: (run(batch), mask)[1])
        with distiller.capture() as captured:
            run(images(2))
        losses.append(distiller.loss(captured, mask).detach())
        costs.append(matching.cost)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(costs[1], costs[0])
    cells = F.avg_pool2d(others, 2)
    cells[1, :, :, 2] = others[1, :, :, 4].unflatten(1, (4, 2)).mean(2)
    counts = torch.ones(2, 4, 4, dtype=torch.bool)
    counts[1, :, 2:] = False  # the third column's centre is at 5, the first pixel that does not count
    expected = oracles.matching_cost(own.double().numpy(), cells.double().numpy(), counts.numpy())
    np.testing.assert_allclose(costs[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 8, 8), r"mask of torch.float32 \(4, 8, 8\): expected torch.bool \(N, H, W\)"),
        (
            torch.ones(4, 1, 8, 8, dtype=torch.bool),
            r"mask of torch.bool \(4, 1, 8, 8\): expected torch.bool \(N, H, W\)",
        ),
        (torch.ones(3, 8, 8, dtype=torch.bool), r"mask of torch.bool \(3, 8, 8\) for features \(4, 4, 8, 8\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Tensor, message: str) -> None:
    distiller = ready()
    with distiller.capture() as captured:
        distiller.student(images())
    with pytest.raises(ValueError, match=message):
        distiller.loss(captured, mask)
    if mask.dtype == torch.bool:
        with pytest.raises(ValueError, match=message):
            distiller.refresh([images()], forward=lambda batch: (distiller.student(batch), mask)[1])


@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_sums_per_image(count: int) -> None:
    sums = ready(loss_weight=[2e-3, 2e-3, 2e-2], loss_reduction="sum").eval()
    means = ready(loss_weight=1).eval()
    loss = sums(images(count))[1]
    means(images(count))
    expected = 0.0
    for position, area, weight, mean in zip(
        means.positions, (64, 16, 4), (2e-3, 2e-3, 2e-2), means.position_losses.tolist(), strict=True
    ):
        expected += weight * mean * position.student_channels * area
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_weights_of_the_paper_are_of_sums_whatever_the_reduction() -> None:
    expected = ready(loss_weight="paper").eval()(images())[1]
    assert torch.equal(ready(loss_weight="paper", loss_reduction="sum").eval()(images())[1], expected)


def test_norm_of_the_user_s_own() -> None:
    distiller = ready(norm=lambda channels: nn.GroupNorm(2, channels))
    assert [position.norm.num_channels for position in distiller.positions] == [4, 8, 16]
    distiller(images())[1].backward()


def test_margins_are_measured_where_no_norm_gives_them() -> None:
    teacher, student = (nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3)) for width in (6, 3))
    distiller = MatchingDistiller(teacher, student, [("1:input", "1:input")], "max", example=images())
    batches = [images(2, seed=1), images(3, seed=2)]
    distiller.refresh(batches)
    measured = oracles.empirical_margin(teacher[0](torch.cat(batches)).detach().double().numpy())
    (position,) = distiller.positions
    assert position.margin_norm is None
    expected = oracles.reduce_margin(measured, position.index.numpy(), "max")
    np.testing.assert_allclose(position.margin.numpy(), expected, rtol=1e-5)


def test_teacher_is_no_part_of_the_distiller() -> None:
    teacher, student = networks()
    names = {*student.state_dict()}
    distiller = MatchingDistiller(teacher, student, example=images())
    ours = {f"positions.{number}.{name}" for number in range(3) for name in POSITION_STATE}
    assert {*distiller.state_dict()} == {f"student.{name}" for name in names} | ours
    assert not {id(value) for value in teacher.parameters()} & {id(value) for value in distiller.parameters()}
    assert teacher not in distiller.modules()
    assert not any("teacher" in name for name, _ in distiller.named_modules())
    assert distiller.teacher is teacher
    assert distiller.student is student


POSITION_STATE = (
    "index",
    "margin",
    "signature",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_point_types(dtype: torch.dtype) -> None:
    expected = ready().eval()(images())[1].item()
    moved = ready().eval().to(dtype)
    assert all(value.dtype == dtype for value in moved.teacher.parameters())
    assert all(value.dtype == dtype for value in moved.parameters())
    assert all(position.index.dtype == torch.int64 for position in moved.positions)
    assert moved(images().to(dtype))[1].item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float64 else 0.1)
    built = MatchingDistiller(*(network.to(dtype) for network in networks()), example=images())
    built.refresh([images(8, seed=1).to(dtype)])
    loss = built.eval()(images().to(dtype))[1]
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float64 else 0.1)
    loss.backward()


def test_margins_follow_weights_that_are_loaded_before_the_refresh() -> None:
    teacher, student = networks()
    distiller = MatchingDistiller(teacher, student, example=images())
    loaded = as_if_trained(Plain(8))
    teacher.load_state_dict(loaded.state_dict())
    distiller.refresh([images()])
    for stage, position in enumerate(distiller.positions):
        norm = loaded.get_submodule(f"bn{stage}")
        expected = batchnorm_margin(norm.weight, norm.bias)[position.index].mean(1)
        torch.testing.assert_close(position.margin, expected)
    matched = distiller.refresh([images()])
    torch.testing.assert_close(matched[0].cost, MatchingDistiller(loaded, student).refresh([images()])[0].cost)


def test_no_matching_yet() -> None:
    distiller = MatchingDistiller(*networks(), example=images())
    with pytest.raises(RuntimeError, match=r"call distiller.refresh\(loader\) before training"):
        distiller(images())
    distiller.load_state_dict(distiller.state_dict())
    assert not distiller.has_matching


def train(distiller: MatchingDistiller, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05)
    losses = []
    for step in steps:
        output, loss = distiller.train()(images(seed=step))
        optimizer.zero_grad()
        (loss + output.square().mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("nested", [False, True])
def test_state_continues_exactly(nested: bool) -> None:
    distiller = ready()
    train(distiller, range(3))
    state = pickle.loads(pickle.dumps(distiller.state_dict()))
    other = MatchingDistiller(distiller.teacher, networks(seed=9)[1], example=images())
    outer = nn.ModuleDict({"distiller": other}) if nested else other
    assert not other.has_matching
    outer.load_state_dict({f"distiller.{name}": value for name, value in state.items()} if nested else state)
    assert other.has_matching
    assert train(other, range(3, 6)) == train(distiller, range(3, 6))
    later = [images(8, seed=7)]
    for found, expected in zip(other.refresh(later), distiller.refresh(later), strict=True):
        assert torch.equal(found.index, expected.index)
        assert found.churn is not None
        assert found.churn == expected.churn
    assert train(other, range(2)) == train(distiller, range(2))


def test_state_of_other_widths_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        ready(8, 4).load_state_dict(ready(8, 2).state_dict())


def test_churn_at_later_refreshes() -> None:
    distiller = ready()
    indices = [position.index.clone() for position in distiller.positions]
    assert [matching.churn for matching in distiller.refresh([images(8, seed=1)])] == [0, 0, 0]
    with torch.no_grad():
        for parameter in distiller.student.parameters():
            parameter.normal_()
    for matching, before in zip(distiller.refresh([images(8, seed=1)]), indices, strict=True):
        moved = (before != matching.index).any()
        assert matching.churn is not None
        assert (matching.churn > 0) == moved
    assert distiller.positions[2].matching.churn > 0


def test_a_matcher_of_the_user_s_own() -> None:
    seen = []

    def matcher(cost: Tensor, group: int) -> Tensor:
        seen.append((cost, group))
        return torch.arange(cost.shape[1]).reshape(-1, group)

    distiller = ready(matcher=matcher)
    for (cost, group), position in zip(seen, distiller.positions, strict=True):
        assert torch.equal(cost.float(), position.matching.cost)
        assert group == 2
        assert torch.equal(position.index.flatten(), torch.arange(position.teacher_channels))


def test_hysteresis_keeps_what_it_does_not_pay_to_change() -> None:
    """The changed matching is optimal for the costs with the bonus of the pairs in force; none changes for a small gain."""
    distillers = [ready(hysteresis=hysteresis) for hysteresis in (0.0, 0.2, 4.0)]
    before = [[position.index.clone() for position in distiller.positions] for distiller in distillers]
    churns = []
    for distiller in distillers:
        with torch.no_grad():  # the same change of all students
            generator = torch.Generator().manual_seed(5)
            for weight in distiller.student.parameters():
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
        churns.append([matching.churn for matching in distiller.refresh([images(8, seed=1)])])
    for own in before[1:]:  # there is nothing to keep at the first
        assert all(torch.equal(*pair) for pair in zip(own, before[0], strict=True))
    assert sum(churns[0]) > sum(churns[1]) > sum(churns[2]) == 0
    for position, old in zip(distillers[1].positions, before[1], strict=True):
        cost = position.matching.cost.clone()
        for student, members in enumerate(old.tolist()):
            for teacher in members:
                cost[student, teacher] -= 0.2
        assert torch.equal(position.index, torch.from_numpy(oracles.balanced_assignment(cost.numpy(), 2)))


@pytest.mark.parametrize("hysteresis", [-0.1, float("inf"), float("nan")])
def test_hysteresis_out_of_range(hysteresis: float) -> None:
    with pytest.raises(ValueError, match=r"hysteresis=.*: expected a finite number of at least 0"):
        ready(hysteresis=hysteresis)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_a_distiller_are_independent(copied: Callable[[Any], Any]) -> None:
    distiller = ready(reduction="max")
    twin = copied(distiller)
    assert twin.has_matching
    assert train(twin, range(3)) == train(copied(distiller), range(3))
    assert twin.teacher is not distiller.teacher
    assert not torch.equal(twin.student.conv0.weight, distiller.student.conv0.weight)
    twin.release()
    expected = distiller.eval()(images())[1]
    with torch.no_grad():
        for parameter in twin.teacher.parameters():
            parameter.zero_()
    torch.testing.assert_close(distiller(images())[1], expected)
    twin = copied(distiller)
    distiller.release()
    torch.testing.assert_close(twin(images())[1], expected)


def gradients(distiller: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    distiller.zero_grad()
    output, loss = distiller(x)
    (loss + output.square().mean()).backward()
    return loss.detach(), [parameter.grad.clone() for parameter in distiller.parameters()]


def compiled(kind: str, backend: str) -> nn.Module:
    def compiling(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend=backend)

    if kind == "distiller":
        return compiling(ready())
    teacher, student = networks()
    if kind == "student":
        student = compiling(student)
    elif kind == "student in place":
        student.compile(backend=backend)
    elif kind == "part of the student":
        student.bn1.compile(backend=backend)
    else:
        teacher = compiling(teacher)
    distiller = MatchingDistiller(teacher, student, example=images())
    distiller.refresh([images(8, seed=1)])
    return distiller


@pytest.mark.parametrize("kind", ["distiller", "student", "student in place", "part of the student", "teacher"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    plain = ready().train()
    module = compiled(kind, "aot_eager" if (kind, backend) == ("student", "eager") else backend).train()
    for seed in range(3):
        expected, found = gradients(plain, images(seed=seed)), gradients(module, images(seed=seed))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for value, other in zip(found[1], expected[1], strict=True):  # of which some are small sums of large terms
            torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-3)
    distiller = module if isinstance(module, MatchingDistiller) else module._orig_mod
    matchings = distiller.refresh([images(8, seed=1)])
    for found, expected in zip(matchings, plain.refresh([images(8, seed=1)]), strict=True):
        torch.testing.assert_close(found.cost, expected.cost, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_losses(backend: str) -> None:
    """In one graph, for any size of the batch."""
    plain, distiller = ready(), ready()
    for position in distiller.positions:
        position.compile(fullgraph=True, dynamic=True, backend=backend)
    for count in (4, 6, 3):
        losses = [made.train()(images(count))[1] for made in (plain, distiller)]
        torch.testing.assert_close(*losses)
        gradients = [
            torch.autograd.grad(loss, [made.student.conv0.weight, made.positions[2].norm.weight])
            for loss, made in zip(losses, (plain, distiller), strict=True)
        ]
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert pickle.loads(pickle.dumps(distiller))(images())[1] == plain(images())[1]


def test_the_teacher_runs_before_the_student_where_its_input_is_known() -> None:
    distiller, order = ready(), []
    for name, network in (("student", distiller.student), ("teacher", distiller.teacher)):
        network.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    first = distiller(images())[1]
    with distiller.capture(images()) as captured:
        distiller.student(images())
    second = distiller.loss(captured)
    with distiller.capture() as captured:
        distiller.student(images())
    third = distiller.loss(captured)
    assert order == ["teacher", "student"] * 2 + ["student", "teacher"]
    assert first == second == third


class Block(nn.Module):
    """A residual block that adds in place and rectifies by a function, as those of many networks for small images."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body, self.shortcut = conv_bn(channels, width, stride=2), conv_bn(channels, width, stride=2, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.shortcut(x)
        return F.relu(out)


def test_sums_in_place_before_a_functional_activation() -> None:
    torch.manual_seed(0)
    made = [as_if_trained(nn.Sequential(Block(3, width), Block(width, 2 * width))) for width in (8, 4)]
    distiller = MatchingDistiller(*made, example=images())
    assert [str(position.teacher) for position in distiller.positions] == [
        f"{number}.body.1:output + {number}.shortcut.1:output" for number in (0, 1)
    ]
    distiller.refresh([images()])
    losses = [distiller(images())[1] for _ in range(3)]
    values = [[], []]
    x = [images(), images()]
    for block in (0, 1):
        for number, network in enumerate(made):
            values[number].append(network[block].body(x[number]) + network[block].shortcut(x[number]))
            x[number] = values[number][-1].relu()
    parts = zip(distiller.positions, values[1], values[0], strict=True)
    expected = sum(5 * position.loss(own, other, "mean") for position, own, other in parts)
    for loss in losses:
        torch.testing.assert_close(loss, expected)


def test_replicas_cannot_add_up_their_features() -> None:
    distiller = ready(online=2).train()
    distiller._is_replica = True
    with pytest.raises(ValueError, match="online: the replicas of DataParallel cannot"):
        distiller(images())


def of_one_stage() -> MatchingDistiller:
    """Two networks whose maps are of equal size for inputs of even size alone."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    student = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    distiller = MatchingDistiller(
        as_if_trained(teacher), as_if_trained(student), [("2:input", "2:input")], example=images()
    )
    distiller.refresh([images()])
    return distiller


@pytest.mark.parametrize("reduction", ["amp", "rd"])
@pytest.mark.parametrize("widths", [(8, 4), (3, 5)])
def test_what_the_teacher_overwrites_is_reduced_not_copied(widths: tuple[int, int], reduction: str) -> None:
    distiller = ready(*widths, reduction=reduction)
    with distiller.capture(images()) as captured:
        distiller.student(images())
    values = captured.teacher_values
    assert values is not None
    if reduction == "rd":  # draws in the order of the losses
        assert not any(isinstance(value, Reduced) for value in values.values())
        return
    whole = features(distiller.teacher, images())
    for number, position in enumerate(distiller.positions):
        guided = position.index[:, 0] >= 0
        expected = reduce_channels(whole[number], position.index[guided], reduction)
        torch.testing.assert_close(values[number].target, expected)
    distiller.refresh([images()])  # for which they are whole


def test_sizes_that_differ_at_one_input_alone() -> None:
    distiller = of_one_stage()
    for size in (8, 9, 8):
        x = images(size=size)
        found = distiller(x)[1]
        own, other = (nn.Sequential(*network[:2]) for network in (distiller.student, distiller.teacher))
        position = distiller.positions[0]
        expected = position.loss(own(x), other(x), "mean") * 5
        torch.testing.assert_close(found, expected)


def test_the_teacher_sees_what_the_student_does_before_either_changes_it() -> None:
    """Both begin with an in-place operation on their input."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.LeakyReLU(0.5, inplace=True), as_if_trained(Plain(width))) for width in (8, 4)]
    distiller = MatchingDistiller(*networks, example=images())
    distiller.refresh([images(8, seed=1)])
    losses = [distiller(images())[1] for _ in range(3)]
    with distiller.capture() as captured:
        distiller.student(images())
    assert losses[0] == losses[1] == losses[2] == distiller.loss(captured)


def test_mixed_precision() -> None:
    expected, distiller = ready().train(), MatchingDistiller(*networks(), example=images())
    with torch.autocast("cpu", torch.bfloat16):
        matchings = distiller.refresh([images(8, seed=1)])
        output, loss = distiller.train()(images())
    assert output.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    for position, other in zip(distiller.positions, expected.positions, strict=True):
        torch.testing.assert_close(position.matching.cost, other.matching.cost, rtol=0, atol=0.05)
        torch.testing.assert_close(position.index, solve_assignment(position.matching.cost))
    assert matchings[0].cost.dtype == torch.float32
    assert loss.item() == pytest.approx(expected(images())[1].item(), rel=0.15)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in distiller.named_parameters() if "fc" not in name)


def test_activation_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, network: Plain) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.network, x, use_reentrant=False)

    teacher, student = networks()
    taps = [(first, f"network.{second}") for first, second in PLAIN_TAPS]
    distiller = MatchingDistiller(teacher, Checkpointed(student), taps, example=images())
    distiller.refresh([images(8, seed=1)])
    plain = ready()
    for seed in range(3):
        found, expected = gradients(distiller.train(), images(seed=seed)), gradients(plain.train(), images(seed=seed))
        torch.testing.assert_close(found, expected)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel_in_one_process() -> None:
    plain, distiller = ready(), ready()
    parallel = DistributedDataParallel(distiller.train())
    for seed in range(2):
        torch.testing.assert_close(gradients(parallel, images(seed=seed)), gradients(plain.train(), images(seed=seed)))
    parallel.module.refresh([images()])
    teacher, student = networks()
    wrapped = MatchingDistiller(teacher, DistributedDataParallel(student), example=images())
    wrapped.refresh([images(8, seed=1)])
    torch.testing.assert_close(gradients(wrapped.train(), images())[0], gradients(ready().train(), images())[0])


def test_synchronised_norms_take_the_place_of_ours() -> None:
    distiller = ready()
    names = [*distiller.state_dict()]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    assert converted is distiller
    assert all(isinstance(position.norm, nn.SyncBatchNorm) for position in distiller.positions)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in distiller.teacher.modules())
    assert [*distiller.state_dict()] == names
    torch.testing.assert_close(distiller.eval()(images()), ready().eval()(images()))


def test_inference_mode() -> None:
    with torch.inference_mode():
        distiller = MatchingDistiller(*networks(), example=images())
        found = distiller.refresh([images(8, seed=1)])
        distiller(images())
    expected = ready()
    for matching, position in zip(found, expected.positions, strict=True):
        assert torch.equal(matching.index, position.index)
    student, other = networks()[1], networks()[0]
    made = MatchingDistiller(other, student, example=images())
    with torch.inference_mode():
        made.refresh([images(8, seed=1)])
    loss = made.train()(images())[1]
    torch.testing.assert_close(loss, expected.train()(images())[1])
    loss.backward()


def test_features_that_are_not_finite_name_the_position() -> None:
    for role in ("teacher", "student"):
        distiller = ready()
        with torch.no_grad():
            getattr(distiller, role).conv1.weight[0] = torch.inf
        with pytest.raises(ValueError, match=r"position relu1:input -> relu1:input: cost of student channel .*finite"):
            distiller.refresh([images()])


def test_bad_reduction_is_told_before_anything_else() -> None:
    with pytest.raises(ValueError, match="unknown reduction 'mix': expected one of sm, rd, amp, max, mean"):
        MatchingDistiller(nn.Identity(), nn.Identity(), reduction="mix")


def test_what_it_prints() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    student = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1))
    taps = [("2:input", "1:input"), ("3", "2")]
    text = str(MatchingDistiller(teacher, student, taps, example=images()))
    assert text.splitlines() == [
        "MatchingDistiller(Sequential -> Sequential",
        "  0: 2:input -> 1:input",
        "     6x6x6 -> 3x6x6, 84% of the body, groups of 2, margins from 1",
        "  1: 3:output -> 2:output",
        "     4x6x6 -> 4x6x6, 100% of the body, groups of 1, margins measured",
        ") guides 100% of the student's body",
    ]


def test_a_state_of_other_taps_or_reduction_is_refused() -> None:
    teacher, student = nn.Sequential(conv_bn(3, 8), nn.ReLU()), nn.Sequential(conv_bn(3, 4), nn.ReLU())
    saved = MatchingDistiller(teacher, student, [("0", "0")]).state_dict()
    assert all(isinstance(value, Tensor) for value in saved.values())
    for taps, reduction in (([("1:input", "1:input")], "amp"), ([("0", "0")], "max")):
        with pytest.raises(ValueError, match="saved for other taps or another reduction than position"):
            MatchingDistiller(teacher, student, taps, reduction).load_state_dict(saved)
    MatchingDistiller(teacher, student, [("0", "0")]).load_state_dict(saved)

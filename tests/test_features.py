"""What the base class of distillers does with two networks, tested in the distiller by matching.

Axes: N images, C channels, H and W positions.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from matchdistill import MatchingDistiller, Tap
from matchdistill.norms import group_norm
from networks import PLAIN_TAPS, Plain, as_if_trained, conv_bn
from test_distiller import images, networks, ready

pytestmark = pytest.mark.usefixtures("one_thread")


def test_teacher_stays_in_evaluation_mode() -> None:
    teacher, student = networks()
    teacher.train()
    distiller = MatchingDistiller(teacher, student, example=images())
    assert not any(module.training for module in teacher.modules())
    statistics = copy.deepcopy(dict(teacher.named_buffers()))
    distiller.train().refresh([images()])
    distiller.train()(images())
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, statistics[name]) for name, value in teacher.named_buffers())
    assert distiller.student.training


def test_teacher_stays_in_evaluation_mode_in_a_larger_model_that_does_not() -> None:
    """The part, or its parts alone, are switched by the model that they belong to."""
    whole, student = networks()
    layers = [whole.conv0, whole.bn0, whole.relu0, whole.conv1, whole.bn1, whole.relu1]
    own = [student.conv0, student.bn0, student.relu0, student.conv1, student.bn1, student.relu1]
    distiller = MatchingDistiller(nn.Sequential(*layers), nn.Sequential(*own), example=images())
    distiller.refresh([images()])
    statistics = copy.deepcopy(dict(whole.named_buffers()))
    expected = distiller.eval()(images())[1]
    whole.train()
    torch.testing.assert_close(distiller(images())[1], expected)
    whole.train()
    distiller.refresh([images()])
    assert all(torch.equal(value, statistics[name]) for name, value in whole.named_buffers())


def test_student_is_untouched() -> None:
    _, student = networks()
    modules, keys, expected = list(student.named_modules()), list(student.state_dict()), student.eval()(images())
    state = copy.deepcopy(student.state_dict())
    distiller = MatchingDistiller(networks()[0], student, example=images())
    distiller.refresh([images()])
    output, _ = distiller(images())
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(student(images()), expected)
    assert list(student.named_modules()) == modules
    assert list(student.state_dict()) == keys
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert all(module.inplace for name, module in modules if name.startswith("relu"))
    assert distiller.release() is student
    for network in (student, distiller.teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    Plain(4).load_state_dict(student.state_dict(), strict=True)


class Whole(nn.Module):
    """A model of which the network is a part that is given something else than the images."""

    def __init__(self, network: Plain) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3))
        self.network, self.head = network, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(self.stem(x) * 2))


def test_parts_of_larger_models() -> None:
    teacher, student = networks()
    whole = Whole(student)
    distiller = MatchingDistiller(teacher, whole.network, example=images())
    seen: list[Tensor] = []
    for network in (student, teacher):
        network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole.eval()
    distiller.refresh([(images(8, seed=1), None)], forward=lambda batch: whole(batch[0]))
    given = whole.stem(images(8, seed=1)) * 2
    assert len(seen) == 2
    for value in seen:
        torch.testing.assert_close(value, given)
    assert distiller.positions[0].matching.images == 8
    seen.clear()
    whole.train()
    with distiller.capture() as captured:
        output = whole(images())
    loss = distiller.loss(captured)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], images())
    (loss + output.sum()).backward()
    assert whole.stem[0].weight.grad.abs().sum() > 0
    reference = MatchingDistiller(*networks(), example=images())
    reference.refresh([given])
    torch.testing.assert_close(loss, reference.train()(seen[0].detach())[1])


class Shift(nn.Module):
    """Adds to its input in place."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.by) if self.by else x


@pytest.mark.parametrize("by", [3, 0])
def test_networks_that_change_their_input_in_place(by: float) -> None:
    """The teacher is given what the student was given, and changes nothing of the student's."""
    torch.manual_seed(0)
    layers = [
        (Shift(shift), nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()) for shift, width in ((10, 6), (by, 3))
    ]
    distiller = MatchingDistiller(nn.Sequential(*layers[0]), nn.Sequential(*layers[1]), example=images())
    seen = []
    distiller.teacher[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    distiller.refresh([images()])
    weight = torch.ones(3, 1, 1, requires_grad=True)
    for _ in range(3):
        x = images() * weight
        distiller.train()(x)[1].backward()
        torch.testing.assert_close(x, images() + by)
    assert len(seen) == 4
    for value in seen:
        torch.testing.assert_close(value, images())
    assert weight.grad.abs().sum() > 0


def test_values_that_are_changed_in_place_after_the_block() -> None:
    distiller, untouched = (ready(taps=[("fc", "fc")]).train() for _ in range(2))
    for seed in range(3):
        x = images(seed=seed)
        with distiller.capture() as captured:
            output = distiller.student(x)
        with torch.no_grad():
            output.relu_()
        torch.testing.assert_close(distiller.loss(captured), untouched(x)[1])
        x = images(seed=seed)
        with untouched.capture() as captured:
            untouched.student(x)
    x.zero_()
    with pytest.raises(ValueError, match="the input was changed in place"):
        untouched.loss(captured)


def test_teacher_has_no_graph() -> None:
    distiller = ready()
    with distiller.capture() as captured:
        distiller.student(images().requires_grad_())
    distiller.loss(captured)
    assert not captured.teacher_output.requires_grad
    torch.testing.assert_close(captured.teacher_output, distiller.teacher(images()).detach())


def test_the_last_call_of_the_student_counts() -> None:
    distiller = ready().eval()
    with distiller.capture() as captured:
        distiller.student(images(2, seed=5))
        distiller.student(images())
    torch.testing.assert_close(distiller.loss(captured), distiller(images())[1])


def test_captures_may_be_nested() -> None:
    distiller = ready().eval()
    expected = distiller(images())[1], distiller(images(2, seed=5))[1]
    with distiller.capture() as outer:
        distiller.student(images())
        inner = distiller(images(2, seed=5))[1]
    torch.testing.assert_close(inner, expected[1])
    torch.testing.assert_close(distiller.loss(outer), expected[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_the_student_are_independent(copied: Callable[[Any], Any]) -> None:
    """As a moving average keeps one."""
    distiller = ready().eval()
    student = copied(distiller.student)
    torch.testing.assert_close(student(images()), distiller.student(images()))
    with distiller.capture() as captured:
        distiller.student(images())
        student(images(seed=5))
    torch.testing.assert_close(distiller.loss(captured), distiller(images())[1])


def replica(module: nn.Module, device: str) -> Any:
    """What DataParallel makes of a module for a device."""
    made = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(made, name, replica(child, device))
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.view_as(parameter).to(device))
    for name, value in module._buffers.items():
        setattr(made, name, None if value is None else value.to(device))
    return made


def test_concurrent_passes() -> None:
    distiller = ready().eval()
    barrier = threading.Barrier(8, timeout=30)

    def run(seed: int) -> float:
        for _ in range(3):
            barrier.wait()
            loss = distiller(images(seed=seed))[1]
        return loss.item()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(8)))
    assert found == pytest.approx([distiller(images(seed=seed))[1].item() for seed in range(8)])


def test_replicas_in_threads() -> None:
    distiller = ready().train()
    replicas = [replica(distiller, "cpu") for _ in range(4)]
    barrier = threading.Barrier(4, timeout=30)

    def run(number: int) -> tuple[Tensor, Tensor]:
        barrier.wait()
        return replicas[number](images(seed=number))

    with ThreadPoolExecutor(4) as pool:
        outputs, losses = zip(*pool.map(run, range(4)), strict=True)
    (torch.stack(losses).mean() + torch.cat(outputs).square().mean()).backward()
    alone = ready().train()
    pairs = [alone(images(seed=number)) for number in range(4)]
    torch.testing.assert_close(torch.stack(losses), torch.stack([loss for _, loss in pairs]))
    (sum(loss for _, loss in pairs) / 4 + torch.cat([output for output, _ in pairs]).square().mean()).backward()
    for found, expected in zip(distiller.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_replica_on_another_device_gets_a_teacher_there() -> None:
    distiller = ready().train()
    output, loss = replica(distiller, "meta")(images().to("meta"))
    assert output.is_meta
    assert loss.is_meta
    assert loss.shape == ()
    (there,) = distiller._teacher.copies.values()
    assert all(parameter.is_meta for parameter in there.model.parameters())
    replica(distiller, "meta")(images().to("meta"))
    assert list(distiller._teacher.copies.values()) == [there]
    assert not any(parameter.is_meta for parameter in distiller.teacher.parameters())
    distiller.refresh([images()])
    assert list(distiller._teacher.copies.values()) == [there]
    distiller.teacher.bn1.weight.data = distiller.teacher.bn1.weight.data + 1
    distiller.refresh([images()])
    assert not distiller._teacher.copies
    distiller(images())[1].backward()


def test_data_parallel_without_devices() -> None:
    distiller = ready().eval()
    torch.testing.assert_close(nn.DataParallel(distiller)(images()), distiller(images()))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("all", "taps='all': expected 'auto' or a sequence"),
        (None, "taps=None: expected 'auto' or a sequence"),
        (Tap("relu0"), r"taps=Tap\(module='relu0', .*: expected 'auto' or a sequence"),
        ([], "taps is empty"),
        (["relu1:input"], "'relu1:input' in taps: expected a pair"),
        ([("relu1", "relu1", "relu1")], "in taps: expected a pair"),
        ([("relu1", 3)], r"\('relu1', 3\) in taps: expected a pair"),
        ([("relu1:inputs", "relu1")], "unknown side 'inputs' of tap 'relu1': expected 'input' or 'output'"),
        ([("relu1", "rleu1")], r"Plain has no module 'rleu1'; did you mean 'relu1'"),
        ([("layer9", "relu1")], r"Plain has no module 'layer9'"),
        ([("relu1", "conv0:input")], "no single feature tensor .* at the input of 'conv0'"),
        ([(Tap("relu1", channel_dim=0), "relu1")], "channel_dim=0 of tap relu1:output"),
    ],
)
def test_bad_taps(taps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MatchingDistiller(*networks(), taps, example=images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("big", "loss_weight='big': expected a number"),
        ([1, 2], "loss_weight has 2 numbers for 3 positions"),
        ([], "loss_weight has 0 numbers for 3 positions"),
        (float("nan"), "expected finite numbers of at least 0"),
        (-1, "loss_weight=-1: expected finite numbers of at least 0"),
        ([1, float("inf"), 1], "expected finite numbers of at least 0"),
        (["a", "b", "c"], "expected finite numbers of at least 0"),
        (None, "loss_weight=None: expected finite numbers"),
    ],
)
def test_bad_weights(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingDistiller(*networks(), loss_weight=weight, example=images())


def test_bad_reduction_of_the_loss() -> None:
    with pytest.raises(ValueError, match="loss_reduction='total': expected 'mean' or 'sum'"):
        MatchingDistiller(*networks(), loss_reduction="total", example=images())


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (32, 32), (48, 16), (24, 8), (7, 1), (1, 1), (8, 8)])
def test_group_norm_has_the_most_groups_that_divide_32_and_the_channels(channels: int, groups: int) -> None:
    assert max(n for n in range(1, 33) if 32 % n == channels % n == 0) == groups
    values = images(2, channels=channels)
    torch.testing.assert_close(group_norm(channels)(values), nn.functional.group_norm(values, groups))


def test_taps_from_yaml_are_lists() -> None:
    distiller = ready(taps=[list(pair) for pair in PLAIN_TAPS])
    torch.testing.assert_close(distiller.eval()(images())[1], ready().eval()(images())[1])


def test_a_failed_distiller_leaves_no_hooks() -> None:
    teacher, student = networks()
    with pytest.raises(ValueError, match="has no module"):
        MatchingDistiller(teacher, student, [("relu1", "relu1"), ("relu1", "relu7")], example=images())
    with pytest.raises(ValueError, match="loss_weight"):
        MatchingDistiller(teacher, student, loss_weight=[1], example=images())
    for network in (teacher, student):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_two_distillers_of_one_student() -> None:
    teacher, student = networks()
    other = as_if_trained(Plain(12))
    both = [MatchingDistiller(network, student, example=images()) for network in (teacher, other)]
    alone = []
    for distiller in both:
        distiller.refresh([images()])
        alone.append(distiller.eval()(images())[1])
    with both[0].capture() as first, both[1].capture() as second:
        student(images())
    torch.testing.assert_close([both[0].loss(first), both[1].loss(second)], alone)


def test_networks_that_share_weights_are_refused() -> None:
    teacher = nn.Sequential(conv_bn(3, 8), nn.ReLU())
    own = nn.Sequential(conv_bn(3, 8), nn.ReLU())
    tied = nn.Sequential(conv_bn(3, 8), nn.ReLU())
    tied[0][0].weight = nn.Parameter(teacher[0][0].weight.detach()[:4])  # another tensor on the same memory
    buffers = nn.Sequential(conv_bn(3, 8), nn.ReLU())
    buffers[0][1].running_mean = teacher[0][1].running_mean
    named = {"0.0.weight": (teacher, nn.Sequential(teacher[0], nn.ReLU()), tied), "0.1.running_mean": (buffers,)}
    for name, students in named.items():
        for student in students:
            with pytest.raises(ValueError, match=f"teacher and student share the tensor '{name}'"):
                MatchingDistiller(teacher, student)
    MatchingDistiller(teacher, own)


@pytest.mark.parametrize("order", ["teacher first", "student first"])
def test_networks_may_share_a_module_without_weights(order: str) -> None:
    """A single activation for all networks of a process, with taps before it; and dropout, which keeps its mode."""
    activation, dropout = nn.ReLU(), nn.Dropout(0.5)

    def network(width: int, shared: bool) -> nn.Sequential:
        torch.manual_seed(width)
        parts = (activation, dropout) if shared else (nn.ReLU(), nn.Dropout(0.5))
        return nn.Sequential(conv_bn(3, width), parts[0], nn.Flatten(), parts[1])

    expected, found = (
        MatchingDistiller(network(8, shared), network(4, shared).train(), [("1:input", "1:input")], example=images())
        for shared in (False, True)
    )
    losses = []
    for distiller in (expected, found):
        assert distiller.student[3].training
        distiller.refresh([images()])
        assert distiller.student[3].training
        torch.manual_seed(0)
        with distiller.capture(*([images()] if order == "teacher first" else [])) as captured:
            distiller.student(images())
            network(6, distiller is found)(images(1))  # a third one that has the activation too
        losses.append(distiller.loss(captured))
        assert distiller.student[3].training
        assert not any(module.training for module in distiller.teacher.modules() if module not in (activation, dropout))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_what_is_no_network_is_refused() -> None:
    for teacher, student, role in (
        (Plain(8), "resnet18", "student is a str"),
        (None, Plain(4), "teacher is a NoneType"),
    ):
        with pytest.raises(TypeError, match=f"the {role}: expected a torch.nn.Module"):
            MatchingDistiller(teacher, student)  # type: ignore[arg-type]


def test_the_share_of_the_body_that_each_position_guides() -> None:
    """By the weights that a gradient of the position's value reaches; a head on pooled features is no part of the body."""
    torch.manual_seed(0)
    teacher, student = networks()
    distiller = MatchingDistiller(teacher, student, example=images())
    body = [weight for name, weight in student.named_parameters() if not name.startswith("fc")]
    whole = sum(weight.numel() for weight in body)
    with distiller.capture() as captured:
        student(images())
    for number, position in enumerate(distiller.positions):
        reached = torch.autograd.grad(captured.values[number].sum(), body, retain_graph=True, allow_unused=True)
        guided = sum(weight.numel() for weight, gradient in zip(body, reached, strict=True) if gradient is not None)
        assert position.guided_share == pytest.approx(guided / whole)
    assert distiller.guided_share == 1
    assert distiller.unguided == []
    assert repr(distiller).endswith(") guides 100% of the student's body")


def test_a_body_that_is_mostly_unguided_is_told_with_its_largest_parts() -> None:
    teacher, student = networks()
    with pytest.warns(UserWarning, match=r"only 7% of the student's body.*most of it in conv2 \(72%\), conv1 \(18%\)"):
        distiller = MatchingDistiller(teacher, student, taps=[("relu0:input", "relu0:input")], example=images())
    assert {name.split(".")[0] for name in distiller.unguided} == {"conv1", "bn1", "conv2", "bn2"}


class Counting(nn.Module):
    """Counts its calls, and sets its scale by the first values that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("scale", torch.tensor(0.0))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(values)
        if self.scale == 0:
            self.scale.copy_(values.abs().max())
        return values + torch.rand(())


@pytest.mark.parametrize("example", [None, torch.zeros(2, 3, 16, 16)])
def test_making_a_distiller_leaves_networks_and_random_numbers_as_they_were(example: Tensor | None) -> None:
    teacher, student = networks()
    student.fc, teacher.fc = (nn.Sequential(Counting(), network.fc) for network in (student, teacher))
    student.train().bn1.eval()
    states = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    random = torch.get_rng_state()
    MatchingDistiller(teacher, student, example=example).release()
    assert torch.equal(torch.get_rng_state(), random)
    assert (student.fc[0].calls, student.fc[0].seen) == (0, [])
    assert [name for name, module in student.named_modules() if not module.training] == ["bn1"]
    for network, state in zip((teacher, student), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_tokens_are_compared_at_the_places_that_they_came_from() -> None:
    """Maps of a teacher, rows and columns exchanged and a class token before them, are the same features."""

    class Turned(Plain):
        def forward(self, values: Tensor) -> Tensor:
            maps = self.relu0(self.bn0(self.conv0(values)))
            tokens = torch.cat([maps.new_zeros(len(maps), 1, maps.shape[1]), maps.mT.flatten(2).mT], dim=1)
            return self.fc(self.last(tokens)[:, 1:].mean(1) @ self.out)

    torch.manual_seed(0)
    teacher = Turned(8)
    teacher.last, teacher.out = nn.Identity(), nn.Parameter(torch.ones(8, teacher.fc.in_features))
    student = Plain(4)
    pixels = torch.randn(2, 3, 16, 8)
    distiller = MatchingDistiller(teacher, student, taps=[("last:input", "conv0")], example=pixels)
    with torch.no_grad():
        maps = teacher.relu0(teacher.bn0(teacher.conv0(pixels)))
        tokens = torch.cat([maps.new_zeros(2, 1, 8), maps.mT.flatten(2).mT], dim=1)
    _, put_back = distiller.positions[0].maps(student.conv0(pixels), tokens)
    assert torch.equal(put_back, maps)


def test_tokens_in_another_order_are_put_back_as_their_own_library_does() -> None:
    """Hiera keeps the tokens of a mask unit together; timm puts them back for its features."""
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 224, 224)
    teacher = timm.create_model("hiera_tiny_224").eval()
    distiller = MatchingDistiller(teacher, timm.create_model("resnet18"), example=pixels)
    with torch.no_grad():
        expected = teacher.forward_intermediates(pixels, indices=4, intermediates_only=True)
        with distiller.capture(pixels) as captured:
            distiller.student(pixels)
        values = distiller.teacher_values(captured)
        pairs = zip(distiller.positions, expected, strict=True)
        for number, (position, maps) in enumerate(pairs):
            torch.testing.assert_close(position.maps(captured.values[number], values[number])[1], maps)

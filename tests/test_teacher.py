import copy

import pytest
import torch
from torch import nn

from matchdistill import MatchingDistiller
from matchdistill.capture import Captured
from matchdistill.models import small_resnet
from matchdistill.taps import Tap
from matchdistill.teacher import FrozenTeacher
from networks import Plain


def captured(*args, **kwargs):
    return Captured(arguments=(args, kwargs))


def test_values_and_output_are_those_of_the_network():
    torch.manual_seed(0)
    network = small_resnet(width=2)
    teacher = FrozenTeacher(network, [Tap("layer1.relu2", "input"), Tap("layer2", "output")])
    images, given = torch.randn(3, 3, 16, 16), captured(torch.zeros(0))
    given.arguments = ((images,), {})
    values = teacher(given)
    plain = copy.deepcopy(network).eval()
    with torch.no_grad():
        first = plain.layer1(plain.stem(images))
        torch.testing.assert_close(values[0].relu(), first)
        torch.testing.assert_close(values[1], plain.layer2(first))
        torch.testing.assert_close(given.teacher_output, plain(images))
    assert (values[0] < 0).any()


def test_evaluation_mode_and_no_graph():
    network = small_resnet(width=2).train()
    teacher = FrozenTeacher(network, [Tap("layer3", "output")])
    assert not network.training
    before = copy.deepcopy(network.state_dict())
    for put_into_training in (network.train, network.layer2.train):
        put_into_training()
        given = captured(torch.randn(2, 3, 16, 16, requires_grad=True))
        values = teacher(given)
        assert not any(module.training for module in network.modules())
        assert not values[0].requires_grad
        assert not given.teacher_output.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Spoiler(nn.Module):
    """Changes its arguments in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, images, *, shift):
        return self.linear(images.add_(shift.mul_(2)))


def test_arguments_are_not_the_teachers_to_change():
    teacher = FrozenTeacher(Spoiler())
    images, shift = torch.ones(2, 4), torch.ones(1)
    for _ in range(3):
        given = captured(images, shift=shift)
        teacher(given)
        assert images.eq(1).all()
        assert shift.eq(1).all()
        torch.testing.assert_close(given.teacher_output, teacher.model.linear(torch.full((2, 4), 3.0)))


def test_arguments_that_the_student_still_needs():
    teacher, weight = FrozenTeacher(Spoiler()), torch.ones(2, 4, requires_grad=True)
    images, shift = weight * 3, torch.ones(1)
    loss = images.square().sum()
    teacher(captured(images, shift=shift))
    loss.backward()
    assert torch.equal(weight.grad, torch.full((2, 4), 18.0))


class Deep(nn.Module):
    """As many times through one in-place activation as it is told."""

    def __init__(self):
        super().__init__()
        self.relu, self.calls = nn.ReLU(inplace=True), 3

    def forward(self, images):
        for _ in range(self.calls):
            images = self.relu(images - 0.5)
        return images


def test_fewer_calls_than_before():
    network = Deep()
    teacher, images = FrozenTeacher(network, [Tap("relu", "input")]), torch.rand(2, 3, 4, 4) * 3
    for network.calls in (3, 3, 2, 4, 1):
        expected = images
        for _ in range(network.calls):
            value = expected - 0.5
            expected = value.relu()
        assert torch.equal(teacher(captured(images))[0], value)


def test_copies_for_other_devices():
    teacher = FrozenTeacher(small_resnet(width=2), [Tap("layer3", "output")])
    assert teacher.on(torch.device("cpu")) is teacher
    other = teacher.on(torch.device("meta"))
    assert next(other.model.parameters()).device.type == "meta"
    assert next(teacher.model.parameters()).device.type == "cpu"
    assert teacher.on(torch.device("meta")) is other
    given = captured(torch.zeros(2, 3, 16, 16, device="meta"))
    assert teacher(given)[0].shape == (2, 8, 4, 4)
    assert given.teacher_output.device.type == "meta"


def test_a_network_without_weights():
    given = captured(torch.ones(2, 3))
    FrozenTeacher(nn.Tanh())(given)
    torch.testing.assert_close(given.teacher_output, torch.ones(2, 3).tanh())


def test_taps_that_do_not_exist():
    with pytest.raises(ValueError, match=r"no module 'layer4'"):
        FrozenTeacher(small_resnet(width=2), [Tap("layer4", "output")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_floating_point_type_than_the_student(dtype):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    teacher, students = Plain(8), (Plain(4), Plain(4))
    students[1].load_state_dict(students[0].state_dict())
    losses = []
    for network, student in zip((teacher, copy.deepcopy(teacher).to(dtype)), students, strict=True):
        distiller = MatchingDistiller(network, student, example=images)
        distiller.refresh([images])
        losses.append(distiller(images)[1].detach().float())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert next(teacher.parameters()).dtype == torch.float32

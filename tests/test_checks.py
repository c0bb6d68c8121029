"""What a distiller sees at its first step: that each position trains the student, in the mode that was matched.

Axes: N images, C channels.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matchdistill import MatchingDistiller
from matchdistill.baselines import AttentionPosition
from matchdistill.checks import leads_to
from matchdistill.features import FeatureDistiller
from networks import PLAIN_TAPS, Function, Plain, conv_bn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:None of the inputs")]


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def distilled(student: nn.Module, **options: Any) -> MatchingDistiller:
    torch.manual_seed(0)
    distiller = MatchingDistiller(Plain(8), student, **{"example": images(), **options})
    distiller.refresh([images()])
    return distiller


def test_a_measuring_pass_in_a_step_is_refused() -> None:
    distiller = distilled(Plain(4))
    with distiller.capture() as captured:
        distiller.student(images())
        with torch.no_grad():
            distiller.student(images())
    with pytest.raises(ValueError, match=r"at relu0:input, relu1:input, relu2:input reaches no weight .*no_grad"):
        distiller.loss(captured)


def test_a_measuring_pass_that_comes_later_is_refused_too() -> None:
    distiller = distilled(Plain(4))
    distiller(images())[1].backward()
    with distiller.capture() as captured, torch.no_grad():
        distiller.student(images())
    with pytest.raises(ValueError, match="reaches no weight"):
        distiller.loss(captured)


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_around_a_tap_are_refused(reentrant: bool) -> None:
    student = Function(
        lambda self, x: self.head(checkpoint(self.body, self.stem(x), use_reentrant=reentrant).mean((2, 3))),
        stem=conv_bn(3, 4),
        body=nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4), nn.ReLU()),
        head=nn.Linear(4, 5),
    )
    teacher = nn.Sequential(conv_bn(3, 8), nn.ReLU())
    torch.manual_seed(0)
    for tap, refused in (("body.1:input", reentrant), ("stem:output", False)):
        distiller = MatchingDistiller(teacher, student, [("1:input", tap)], example=images())
        distiller.refresh([images()])
        student.zero_grad()
        if refused:
            with pytest.raises(ValueError, match=r"body.1:input reaches no weight .*use_reentrant=False"):
                distiller(images())
        else:
            distiller(images())[1].backward()
            assert student.get_parameter("stem.0.weight").grad.abs().sum() > 0
        distiller.release()


def test_a_loss_to_look_at_is_not_refused() -> None:
    distiller = distilled(Plain(4))
    expected = distiller.eval()(images())[1].detach()
    with torch.no_grad():
        assert distiller(images())[1].equal(expected)
    with distiller.capture() as captured, torch.no_grad():
        distiller.student(images())
    assert distiller.loss(captured).detach().equal(expected)
    with torch.no_grad():
        distiller.train()(images())


@pytest.mark.parametrize("grad_input", [False, True])
def test_what_is_frozen_on_purpose_is_named_once(grad_input: bool) -> None:
    student = Plain(4)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.endswith(("0.weight", "0.bias", "1.weight", "1.bias")))
    distiller = distilled(student)
    with pytest.warns(UserWarning, match="nothing before relu0:input, relu1:input is to be trained"):
        distiller(images().requires_grad_(grad_input))[1].backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(images())[1].backward()
    student.requires_grad_(True)
    student.zero_grad()
    distiller(images())[1].backward()
    assert student.conv0.weight.grad.abs().sum() > 0


def test_weights_that_are_computed_count_as_trained() -> None:
    student = Plain(4)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(student.conv0)
    for parameter in student.conv0.parametrizations.parameters():
        parameter.requires_grad_(True)
    distiller = distilled(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(images())[1].backward()
    with distiller.capture() as captured, torch.no_grad():
        student(images())
    with pytest.raises(ValueError, match="reaches no weight"):
        distiller.loss(captured)


def test_where_a_graph_leads() -> None:
    weight, other, value = (torch.ones(3, requires_grad=True) for _ in range(3))
    made = (weight * value).sin()
    assert leads_to(made, {id(weight)})
    assert not leads_to(made, {id(other)})
    assert not leads_to(value, {id(other)})
    assert leads_to(checkpoint(torch.sin, value, use_reentrant=True), {id(other)})  # nobody sees into it


class Head(nn.Module):
    """Gives one map in evaluation mode, and something else in training mode."""

    def __init__(self, changed: str) -> None:
        super().__init__()
        self.changed = changed

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return x
        return {"channels": x[:, :2], "size": x[:, :, ::2], "nested": (x[:, :, :1], x), "nothing": "text"}[self.changed]


class OfMode(nn.Module):
    """A network with such a head beside its classifier."""

    def __init__(self, width: int, changed: str) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, width), nn.ReLU(), conv_bn(width, width, 2), nn.ReLU())
        self.head, self.fc = Head(changed), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        values = self.body(x)
        self.head(values)
        return self.fc(values.mean((2, 3)))


HEAD_TAPS = [("relu0:input", "body.1:input"), ("relu1:input", "head:output")]


@pytest.mark.parametrize("changed", ["channels", "size", "nested", "nothing"])
def test_a_tap_whose_value_depends_on_the_mode_is_refused(changed: str) -> None:
    torch.manual_seed(0)
    student = OfMode(4, changed)
    with pytest.raises(ValueError, match=r"other values in training mode at head:output \((values|nothing)"):
        MatchingDistiller(Plain(8), student, HEAD_TAPS, example=images())
    distiller = MatchingDistiller(Plain(8), student, HEAD_TAPS)
    state = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="other values in training mode at head:output"):
        distiller.refresh([images()])
    assert student.training
    assert all(value.equal(state[name]) for name, value in student.state_dict().items())
    distiller.release()
    at = FeatureDistiller(Plain(8), student, HEAD_TAPS, AttentionPosition)
    with pytest.raises(ValueError, match=r"other values in evaluation mode at head:output|did not reach head:output"):
        at(images())


def test_automatic_taps_leave_out_what_depends_on_the_mode() -> None:
    def network(width: int) -> nn.Module:
        return Function(
            lambda self, x: self.end(self.body(x)),
            body=nn.Sequential(conv_bn(3, width), nn.ReLU()),
            end=Function(
                lambda self, x: self.inner(x if not self.training else x[:, :, ::2]),
                inner=conv_bn(width, width, 2),
            ),
        )

    torch.manual_seed(0)
    distiller = MatchingDistiller(network(8), network(4), example=images())
    assert [str(position.student) for position in distiller.positions] == ["body.1:input"]
    distiller.refresh([images()])
    distiller(images())[1].backward()


def test_a_network_that_needs_more_in_training_is_looked_at_when_it_trains() -> None:
    student = Function(
        lambda self, x, labels=None: self.plain(x) if not self.training or labels is not None else 1 / 0, plain=Plain(4)
    )
    teacher = Function(lambda self, x, labels=None: self.plain(x), plain=Plain(8))
    torch.manual_seed(0)
    taps = [(f"plain.{one}", f"plain.{two}") for one, two in PLAIN_TAPS]
    distiller = MatchingDistiller(teacher, student, taps, example=images())
    distiller.refresh([images()])
    distiller(images(), labels=torch.zeros(4))[1].backward()

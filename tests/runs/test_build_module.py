import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.methods import METHODS
from matchdistill.models import small_resnet
from matchdistill.runs.build import build_module, build_teacher, check_state, corrupts_memory


@pytest.fixture
def other_classes(tmp_path):
    """Weights of the teacher for seven classes, not ten."""
    path = tmp_path / "seven.pt"
    torch.save(small_resnet(num_classes=7, width=4).state_dict(), path)
    return f"--teacher.weights={path}", "--teacher.fresh_head=true"


def test_a_teacher_whose_head_nobody_trains_teaches_features_alone(tiny, other_classes):
    teacher = build_module(tiny(*other_classes, "--distillation.method=mgd-amp")).teacher
    assert teacher.fc.out_features == 10
    build_module(tiny(*other_classes, "--distillation.method=kd", "--teacher.training.epochs=1"))
    for method in ("kd", "mgd-amp+kd"):
        with pytest.raises(ValueError, match="weights are for 7 classes, the model has 10"):
            build_module(tiny(*other_classes, f"--distillation.method={method}"))


def test_nor_has_a_teacher_of_a_library_s_weights_a_new_head_for_its_output(tiny, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, num_classes=9, **_: small_resnet(num_classes, 4))
    for method, message in (("kd", r"the teacher gives \(2, 9\) for 2 images, but the data has 10"), ("mgd-amp", None)):
        recipe = tiny("--teacher.name=timm:resnet18", "--teacher.options={}", f"--distillation.method={method}")
        recipe.data.setup()
        if message is None:
            assert build_teacher(recipe, "pretrained").fc.out_features == 10
        else:
            with pytest.raises(ValueError, match=message):
                build_teacher(recipe, "pretrained")


@pytest.mark.parametrize("name", ["fitnets", "at", "ofd"])
def test_a_baseline_has_the_weight_of_its_recipe(tiny, name):
    distiller = build_module(tiny(f"--distillation.method={name}", f"--distillation.weights.{name}=0.3")).distiller
    assert {type(position) for position in distiller.positions} == {METHODS[name].position}
    assert distiller._weights == [0.3] * len(distiller.positions)


@pytest.mark.parametrize(("features", "matcher"), [("mgd", solve_assignment), ("random", random_assignment)])
def test_the_matching_is_that_of_the_recipe(tiny, features, matcher):
    options = f"--distillation.method={features}-rd", "--distillation.hysteresis=0.2", "--distillation.weights.mgd=3"
    distiller = build_module(tiny(*options)).distiller
    assert distiller._weights == [3.0] * len(distiller.positions)
    for position in distiller.positions:
        assert (position.matcher, position.hysteresis, position.reduction) == (matcher, 0.2, "rd")


class Mutable(nn.Module):
    """Counts its calls and takes its scale from the first batch; in training it returns what it is told to."""

    def __init__(self, num_classes, returned="logits", lazy=False, extra=False):
        super().__init__()
        self.network = small_resnet(num_classes, width=2)
        self.calls, self.scale, self.returned = 0, nn.Parameter(torch.ones(())), returned
        self.norm = nn.BatchNorm2d(3).eval()
        self.first = nn.LazyConv2d(3, 1) if lazy else nn.Identity()
        if extra:
            self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self, images):
        self.calls += 1
        if self.calls == 1:
            self.scale.data.copy_(images.abs().mean())
        logits = self.network(self.norm(self.first(images)))
        if not self.training or self.returned == "logits":
            return logits
        features = torch.stack([logits.detach() * 3 + 1] * 2)
        return {
            "tuple": (features, logits),
            "pair": (features[0], logits),
            "dict": {"features": features[0], "out": {"logits": logits}},
            "dataclass": Output(features[0], logits),
            "features": features,
            "nothing": None,
        }[self.returned]


@dataclass
class Output:
    features: torch.Tensor
    scores: torch.Tensor


def of_tests(tiny, *arguments, method="mgd-amp", **options):
    return tiny(
        "--student.name=test_build_module:Mutable", f"--student.options={json.dumps(options)}",
        f"--distillation.method={method}", *arguments,
    )  # fmt: skip


@pytest.fixture
def importable(monkeypatch):
    """This file by its name, which recipes give."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_build_module", sys.modules[__name__])


@pytest.mark.parametrize("method", ["none", "kd"])
def test_build_module_looks_at_networks_without_a_trace(importable, tiny, method):
    module = build_module(of_tests(tiny, method=method))
    student = module.network()
    assert (student.calls, student.scale.item()) == (0, 1)
    assert [student.training, student.norm.training, student.network.training] == [True, False, True]


def test_a_lazy_network_gets_its_sizes(importable, tiny):
    student = build_module(of_tests(tiny, lazy=True, method="none")).network()
    assert student.first.weight.shape == (3, 3, 1, 1)
    assert student.training


@pytest.mark.parametrize("returned", ["tuple", "pair", "dict", "dataclass"])
def test_logits_are_found_where_training_gives_them(importable, tiny, returned):
    module = build_module(of_tests(tiny, returned=returned, method="kd")).train()
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    logits, losses = module.losses(images)
    plain = build_module(of_tests(tiny, method="kd")).train()
    plain.load_state_dict(module.state_dict())
    expected, of_plain = plain.losses(images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(losses, of_plain)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("features", r"in training mode the student gives \(2, 2, 10\): expected logits \(N, 10\)"),
        ("nothing", "in training mode the student gives NoneType: expected logits"),
    ],
)
def test_training_without_logits_is_refused(importable, tiny, returned, message):
    with pytest.raises(ValueError, match=message):
        build_module(of_tests(tiny, returned=returned))


def test_states_that_cannot_be_saved_are_refused(importable, tiny):
    with pytest.raises(ValueError, match=r"the student's state_dict\(\) has 'sparse', a tensor of layout torch.sparse"):
        build_module(of_tests(tiny, extra=True))


class Packed(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_what_a_file_of_weights_can_hold():
    check_state(nn.BatchNorm2d(3), "student")
    with pytest.raises(ValueError, match="'_extra_state', of type dict"):
        check_state(Packed(2, 2), "student")
    odd = nn.Linear(2, 2)
    odd.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="'wide', a tensor of type"):
        check_state(odd, "student")


def test_a_random_teacher_is_the_same_in_every_process_and_for_every_student(tiny):
    options = "--teacher.weights=null", "--teacher.options={width: 2}"
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever was drawn before
        module = build_module(tiny(*options, f"--seed={seed}", "--distillation.method=mgd-amp"))
        weights.append([network.fc.weight for network in (module.teacher, module.network())])
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][0], weights[2][0])
    assert not torch.equal(weights[0][0], weights[0][1])  # nor is it the student
    alone = build_module(tiny("--seed=0", "--distillation.method=none"))
    assert torch.equal(weights[0][1], alone.network().fc.weight)


@pytest.mark.parametrize(
    ("width", "stride", "kernel", "crashes"), [(4, 2, 1, True), (8, 2, 1, False), (4, 1, 1, False), (4, 2, 3, False)]
)
def test_channels_last_is_left_out_where_it_may_crash(width, stride, kernel, crashes):
    # A process of its own, since a crash ends it: on CPUs that have the fault, what is not left out has to live.
    network = torch.nn.Sequential(torch.nn.Conv2d(width, 8, kernel, stride=stride, bias=False))
    assert corrupts_memory(network) == crashes
    if not crashes:
        code = (
            "import torch\n"
            f"network = torch.nn.Conv2d({width}, 8, {kernel}, stride={stride}, bias=False)\n"
            "for _ in range(100):\n"
            f"    images = torch.randn(4, {width}, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
            "    network(images).square().sum().backward()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

"""Classifiers whose body is frozen."""

import pytest
import torch
from torch import nn

from matchdistill.models import small_resnet
from matchdistill.runs.build import build_module
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    network = small_resnet(width=2)
    torch.save(network.state_dict(), tmp_path / "start.pt")
    return tmp_path / "start.pt", network.state_dict()


@pytest.mark.parametrize("method", ["none", "kd"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_alone_is_trained(tiny, weights, tmp_path, method, optimizer):
    path, before = weights
    arguments = [f"--distillation.method={method}", "--training.frozen=true", f"--training.optimizer={optimizer}"]
    recipe = tiny(*arguments, f"--student.weights={path}")
    fit(recipe, tmp_path / "out", quiet=True)
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    after = {name: state[f"student.{name}"] for name in before}
    assert sorted(name for name, value in before.items() if not torch.equal(value, after[name])) == [
        "fc.bias",
        "fc.weight",
    ]


def test_the_head_learns_as_a_linear_layer_on_the_features(tiny, weights):
    """The gradient is that of softmax regression on the pooled features of evaluation mode."""
    path, _ = weights
    recipe = tiny("--distillation.method=none", "--training.frozen=true", f"--student.weights={path}")
    module = build_module(recipe)
    module.train()
    batch = next(iter(recipe.data.train_dataloader()))
    sum(module.batch_losses(batch).values()).backward()
    student = module.network()
    assert student.fc.training
    assert not any(part.training for name, part in student.named_modules() if name != "fc")
    images, labels = batch
    with torch.no_grad():
        head, student.fc = student.fc, nn.Identity()
        features = student(images)
        wrong = head(features).softmax(1) - nn.functional.one_hot(labels, 10)
    torch.testing.assert_close(head.weight.grad, wrong.T @ features / len(labels))
    student.fc = head
    module.eval()
    assert not head.training


@pytest.mark.filterwarnings("ignore:.*starts from random weights")
def test_the_head_starts_as_it_is_said(tiny, weights, tmp_path):
    """From normal weights of a deviation and zero biases, but not where a trained student is loaded into it."""
    path, before = weights
    given = ["--distillation.method=none", "--training.frozen=true", f"--student.weights={path}"]
    recipe = tiny(*given, "--training.head_std=0.01", "--student.options={width: 40}", "--student.weights=null")
    head = build_module(recipe).network().fc
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.weight.mean().abs() < 0.001
    assert head.bias.count_nonzero() == 0
    assert torch.equal(build_module(tiny(*given)).network().fc.weight, before["fc.weight"])
    recipe = tiny(*given, "--training.head_std=0.01")
    body = build_module(recipe).network().state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, body[name])] == ["fc.weight", "fc.bias"]
    metrics = fit(recipe, tmp_path / "run", quiet=True)
    assert validate(recipe, tmp_path / "run")["student"] == metrics.student


def test_a_random_body_is_warned_of(tiny):
    with pytest.warns(UserWarning, match=r"starts from random weights and keeps them: give student.weights"):
        build_module(tiny("--distillation.method=none", "--training.frozen=true"))


def test_features_cannot_be_distilled_into_a_frozen_body(tiny):
    with pytest.raises(ValueError, match="trains the head alone, but method 'mgd-amp' teaches features of the body"):
        tiny("--training.frozen=true", "--distillation.method=mgd-amp")


def test_a_network_without_a_head_of_its_own(tiny, tmp_path, monkeypatch):
    (tmp_path / "ten.py").write_text(
        "from matchdistill.models import small_resnet\n\ndef ten():\n    return small_resnet()\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--student.name=ten:ten",
        "--student.options={}",
        "--distillation.method=none",
        "--training.frozen=true",
    ]
    with pytest.raises(ValueError, match=r"training.frozen: model 'ten:ten' has no head of its own"):
        build_module(tiny(*arguments))

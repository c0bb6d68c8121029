"""Other packages beside the library: torchdistill is told of the same positions; where a package is there, it is timed."""

import json

import pytest
import torch
import torchvision

from benchmarks.pairs import Pair, random_batch
from benchmarks.peers import lightly_train_step, steps
from benchmarks.peers import torchdistill as peer


def small_pair():
    return peer.staged(Pair(torchvision.models.resnet34, torchvision.models.resnet18, ()))


def test_connectors_have_the_widths_of_the_positions():
    images, _ = random_batch(32, 2)
    pair = peer.staged(Pair(torchvision.models.resnet50, torchvision.models.resnet18, ()))
    distiller = pair.distiller(images)
    told = peer.configuration(distiller.teacher, distiller.student)
    connectors = told["student"]["auxiliary_model_wrapper"]["kwargs"]["connectors"].values()
    widths = [
        (each["conv2d_kwargs"]["in_channels"], each["conv2d_kwargs"]["out_channels"], each["path"])
        for each in connectors
    ]
    assert widths == [
        (position.student_channels, position.teacher_channels, f"student_model.{position.student.module}")
        for position in distiller.positions
    ]
    assert widths[-1] == (512, 2048, "student_model.layer4")


def test_steps_are_timed_in_turn(tmp_path, monkeypatch):
    pytest.importorskip("torchdistill.core.distillation")
    monkeypatch.setattr(peer, "chosen", lambda _: {"small": small_pair()})
    peer.run(tmp_path / "peers.json", size=32, batch=2, rounds=2)
    works = json.loads((tmp_path / "peers.json").read_text())["results"]["pairs"]["resnet50 -> resnet18"]
    assert set(works) == set(peer.WORKS)
    assert all(own["tensors"] > 0 for own in works.values())


@pytest.mark.parametrize("name", ["limit", "matchdistill", "fitnets", "alone", "lightly-train"])
def test_a_step_without_labels_trains_the_student_alone(monkeypatch, name):
    if name == "lightly-train":
        pytest.importorskip("lightly_train")
    made, networks = [], Pair.networks
    monkeypatch.setattr(Pair, "networks", lambda *own: made.append(networks(*own)) or made[-1])
    pair = lightly_train_step.last(Pair(torchvision.models.resnet34, torchvision.models.resnet18, ()))
    step = lightly_train_step.WORKS[name](pair, random_batch(32, 2)[0])
    teacher, student = made[0]
    before = [[weight.clone() for weight in network.layer4.parameters()] for network in (teacher, student)]
    step()
    changed = [
        [not torch.equal(one, other) for one, other in zip(weights, network.layer4.parameters(), strict=True)]
        for weights, network in zip(before, (teacher, student), strict=True)
    ]
    assert not any(changed[0])
    assert all(changed[1])


def test_works_are_timed_beside_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.importlib.metadata, "version", lambda package: f"{package} 1.0")
    values = {"limit": 10_000, "other": 20_000}
    works = {name: lambda size=size: lambda: torch.zeros(size).exp() for name, size in values.items()}
    steps.beside("other", works, tmp_path / "peers.json", 2, size=8)
    written = json.loads((tmp_path / "peers.json").read_text())["results"]
    assert written["packages"]["other"] == "other 1.0"
    found = written["pairs"][steps.PAIR]
    assert found["other"]["tensors"] == 2 * found["limit"]["tensors"]
    assert found["limit"]["ratio"]["median"] == 1

"""torchdistill is told of the same positions and widths that the library finds; with the package, both are timed."""

import json

import pytest
import torchvision

from benchmarks.pairs import Pair, random_batch
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

"""The benchmark of adaptive refreshes, on few images."""

import pytest
import torch
from torch import nn

from benchmarks import adaptive
from matchdistill import MatchingDistiller
from matchdistill.data.tensors import GrayImages, TensorDataset
from networks import PLAIN_TAPS, Plain, as_if_trained

pytestmark = pytest.mark.usefixtures("one_thread")


def pair_and_images():
    torch.manual_seed(0)
    data = TensorDataset(GrayImages(torch.randint(256, (700, 8, 8), dtype=torch.uint8), torch.randint(5, (700,))))
    networks = [adaptive.trained(as_if_trained(Plain(width)), data, torch.arange(64), "cpu") for width in (8, 4)]
    return MatchingDistiller(*networks, PLAIN_TAPS), data


def test_what_matchings_of_fewer_images_lack(monkeypatch):
    monkeypatch.setattr("matchdistill.refresh.FIRST_CHECK", 128)
    monkeypatch.setattr(adaptive, "doublings", lambda *_: [2, 640])
    distiller, data = pair_and_images()
    found = adaptive.measure(distiller, data, torch.arange(60, 700), 10.0, 2, "cpu")
    assert found["full"]["images"] == 640
    assert [each["images"] for each in found["adaptive"]] == [128, 128]
    assert [each["images"] for each in found["fixed"]] == [2, 640]
    assert all(value >= -1e-6 for each in found["adaptive"] + found["fixed"] for value in each["excess"])
    assert found["fixed"][1]["excess"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert max(found["fixed"][0]["excess"]) > 1e-3
    assert len(found["positions"]) == 3


def test_what_online_matchings_lack():
    distiller, data = pair_and_images()
    found = adaptive.measure_online(distiller, data, torch.arange(60, 700), 10, 2, "cpu")
    assert found["images"] == {"online": 5 * 64, "full": 640}
    assert max(found["excess"]["online"]) > 1e-4
    assert all(value >= -1e-6 for values in found["excess"].values() for value in values)


def test_a_matching_by_steps_that_leave_the_student_lacks_nothing(monkeypatch):
    """All images in one step, in evaluation mode, whose weights stay: the sums are those of the other matching."""
    monkeypatch.setattr(adaptive, "BATCH", 640)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    distiller, data = pair_and_images()
    for network in (distiller.student, *distiller.positions):
        network.train = lambda mode=True, network=network: nn.Module.train(network, False)
    found = adaptive.measure_online(distiller, data, torch.arange(60, 700), 1, 1, "cpu")
    assert found["images"] == {"online": 640, "full": 640}
    assert found["excess"]["online"] == pytest.approx([0, 0, 0], abs=1e-6)

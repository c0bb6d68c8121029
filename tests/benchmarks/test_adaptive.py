"""The benchmark of adaptive refreshes, on few images."""

import pytest
import torch

from benchmarks import adaptive
from matchdistill import MatchingDistiller
from matchdistill.data.tensors import GrayImages, TensorDataset
from networks import PLAIN_TAPS, Plain, as_if_trained

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_matchings_of_fewer_images_lack(monkeypatch):
    monkeypatch.setattr("matchdistill.distiller.FIRST_CHECK", 128)
    monkeypatch.setattr(adaptive, "doublings", lambda *_: [2, 640])
    torch.manual_seed(0)
    data = TensorDataset(GrayImages(torch.randint(256, (700, 8, 8), dtype=torch.uint8), torch.randint(5, (700,))))
    networks = [adaptive.trained(as_if_trained(Plain(width)), data, torch.arange(64), "cpu") for width in (8, 4)]
    distiller = MatchingDistiller(*networks, PLAIN_TAPS)
    found = adaptive.measure(distiller, data, torch.arange(60, 700), 10.0, 2, "cpu")
    assert found["full"]["images"] == 640
    assert [each["images"] for each in found["adaptive"]] == [128, 128]
    assert [each["images"] for each in found["fixed"]] == [2, 640]
    assert all(value >= -1e-12 for each in found["adaptive"] + found["fixed"] for value in each["excess"])
    assert found["fixed"][1]["excess"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert max(found["fixed"][0]["excess"]) > 1e-3
    assert len(found["positions"]) == 3

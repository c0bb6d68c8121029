"""Networks without their heads."""

import pytest
import timm
import torch

from matchdistill.models import build_body, build_model


@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("torchvision:resnet18", "fc", 512),
        ("torchvision:mobilenet_v3_small", "classifier.3", 1024),
        ("timm:resnet10t", "fc", 512),
        ("matchdistill.models:small_resnet", "fc", 128),
    ],
)
def test_the_head_is_cut_and_all_else_keeps_its_name(name, head, width):
    torch.manual_seed(0)
    body = build_body(name).eval()
    whole = build_model(name).state_dict()
    assert body.state_dict().keys() == {key for key in whole if not key.startswith(f"{head}.")}
    assert body(torch.randn(2, 3, 64, 64)).shape == (2, width)


def test_the_body_is_timms_own():
    torch.manual_seed(0)
    body = build_body("timm:resnet10t").eval()
    theirs = timm.create_model("resnet10t", num_classes=0).eval()
    theirs.load_state_dict(body.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(body(images), theirs(images))


def test_weights_of_a_classifier_lose_their_head(tmp_path):
    whole = build_model("matchdistill.models:small_resnet", 7, width=4)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    body = build_body("matchdistill.models:small_resnet", tmp_path / "whole.pt", width=4)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())
    broken = {key: value for key, value in state.items() if key != "layer1.conv1.weight"}
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"layer1.conv1.weight .* is missing"):
        build_body("matchdistill.models:small_resnet", tmp_path / "broken.pt", width=4)


def test_building_another_network_draws_nothing():
    torch.manual_seed(0)
    build_body("matchdistill.models:small_resnet")
    after = torch.rand(1)
    torch.manual_seed(0)
    build_model("matchdistill.models:small_resnet", 2)
    assert torch.equal(torch.rand(1), after)


def test_a_head_that_is_no_module(tmp_path, monkeypatch):
    (tmp_path / "bare_head.py").write_text("from torch import nn\nimport torch\n\nclass Bare(nn.Module):\n"
                                           "    def __init__(self, num_classes=3):\n        super().__init__()\n"
                                           "        self.weight = nn.Parameter(torch.zeros(num_classes, 3))\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be taken without its head, which is no module of its own"):
        build_body("bare_head:Bare")

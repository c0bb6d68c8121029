import pytest
import torch
from torch import nn
from torchvision import models

from matchdistill.models.shufflenet import shufflenet_v2_x1_0


@pytest.fixture
def pair():
    """torchvision's network and ours with the same weights, batch norms that do something, in evaluation mode."""
    torch.manual_seed(0)
    plain, own = models.shufflenet_v2_x1_0(num_classes=5), shufflenet_v2_x1_0(num_classes=5)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            module.momentum = 1.0
    plain(torch.randn(8, 3, 64, 64))
    own.load_state_dict(plain.state_dict(), strict=True)
    return plain.eval(), own.eval()


def test_it_computes_the_same(pair):
    plain, own = pair
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(own(images), plain(images))
    for model in (plain.train(), own.train()):
        model(images).square().sum().backward()
    for (name, weight), other in zip(own.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name, rtol=1e-3, atol=1e-3)


def test_stages_end_before_the_activation(pair):
    outputs = []
    for model in pair:
        outputs.append([])
        for stage in (model.stage2, model.stage3, model.stage4):
            stage.register_forward_hook(lambda _, inputs, output, into=outputs[-1]: into.append(output))
        with torch.no_grad():
            model(torch.ones(2, 3, 64, 64).cumsum(2) / 64)
    for activated, before, width in zip(*outputs, (116, 232, 464), strict=True):
        assert before.shape[1] == width
        assert (before < 0).float().mean((0, 2, 3)).gt(0).float().mean() > 0.5  # in most channels
        torch.testing.assert_close(before.relu(), activated)

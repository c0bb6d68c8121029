import pytest
import torch
from torch import nn

from matchdistill.models import small_resnet


@pytest.mark.parametrize(("width", "in_channels", "size"), [(8, 3, 16), (4, 1, 16), (4, 3, 17)])
def test_shapes(width, in_channels, size):
    model = small_resnet(5, width, in_channels)
    shapes = {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda *call, name=name: shapes.update({name: call[2].shape[1:]})
        )
    assert model(torch.randn(2, in_channels, size, size)).shape == (2, 5)
    sizes = [size, (size + 1) // 2, (size + 3) // 4]
    assert [shapes[f"layer{i + 1}"] for i in range(3)] == [(width << i, sizes[i], sizes[i]) for i in range(3)]


def test_every_convolution_is_normalised_and_every_relu_is_a_module_of_its_own():
    model = small_resnet(width=4)
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(torch.randn(2, 3, 16, 16))
    assert set(calls.values()) == {1}
    assert len(calls) == 7
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 9


def test_outputs_start_at_unit_scale_and_learn():
    torch.manual_seed(0)
    model = small_resnet(num_classes=2, width=8)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 2
    images[labels == 1] += 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 2
    assert losses[-1] < 0.2

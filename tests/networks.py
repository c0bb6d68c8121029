"""Small networks that several test modules share."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def conv_bn(channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels_out)
    )


class Function(nn.Module):
    """A function of itself and the input, with the modules that it is given by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Plain(nn.Module):
    """Convolution, batch norm and ReLU three times, at full, half and quarter resolution."""

    def __init__(self, width: int, channels: int = 3, inplace: bool = True) -> None:
        super().__init__()
        for stage in range(3):
            channels_in, channels_out = (width * 2 ** (stage - 1), width * 2**stage) if stage else (channels, width)
            setattr(self, f"conv{stage}", nn.Conv2d(channels_in, channels_out, 3, 1 + (stage > 0), 1, bias=False))
            setattr(self, f"bn{stage}", nn.BatchNorm2d(channels_out))
            setattr(self, f"relu{stage}", nn.ReLU(inplace))
        self.fc = nn.Linear(4 * width, 5)

    def forward(self, images: Tensor) -> Tensor:
        values = self.relu0(self.bn0(self.conv0(images)))
        values = self.relu1(self.bn1(self.conv1(values)))
        values = self.relu2(self.bn2(self.conv2(values)))
        return self.fc(values.mean((2, 3)))


PLAIN_TAPS = [(f"relu{stage}:input", f"relu{stage}:input") for stage in range(3)]


def as_if_trained(network: nn.Module) -> nn.Module:
    """Batch norms with scales, shifts and statistics of their own, some scales negative."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for values in (module.weight, module.bias, module.running_mean):
                    values.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


def losses_of_garbage(
    position: nn.Module, own: Tensor, others: Tensor, mask: Tensor
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Masked losses of a position, and their gradients for the student's features and for its parameters.

    Between one and the next, only what student and teacher hold beside the mask differs.
    """
    for garbage in (0.0, torch.nan, torch.inf, -1e9):
        position.zero_grad()
        student, teacher = (value.masked_fill(~mask[:, None], garbage) for value in (own, others))
        loss = position.loss(student.requires_grad_(), teacher, "mean", mask)
        loss.backward()
        yield loss.detach(), [student.grad, *(parameter.grad for parameter in position.parameters())]

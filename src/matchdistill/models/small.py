"""The small network of the quickstart.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn


def small_resnet(num_classes: int = 10, width: int = 32, in_channels: int = 3) -> SmallResNet:
    """A residual network for images of about 16 px: three stages of one block, ``width`` to ``4 * width`` channels.

    Examples:
        >>> import torch
        >>> small_resnet(width=8)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    return SmallResNet(num_classes, width, in_channels)


class SmallResNet(nn.Module):
    """Built by :func:`small_resnet`."""

    def __init__(self, num_classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        # Stride 1: at 16 px a stem that halves, as at 224 px, would leave little to look at.
        self.stem = nn.Sequential(_conv(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = ResidualBlock(width, width, stride=1)
        self.layer2 = ResidualBlock(width, 2 * width, stride=2)
        self.layer3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(images))))
        logits: Tensor = self.fc(self.pool(features).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels_out, channels_out, 3)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(_conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out))
        self.relu2 = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels_out, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        output: Tensor = self.relu2(residual + self.shortcut(features))
        return output


def _conv(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the batch norm that follows has one.
    return nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)

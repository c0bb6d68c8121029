"""Networks around one of timm's, as people write them.

Axes: N batch, C channels, L length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.zoo.network import BATCH, Network, images


def network(name: str, net: str = "resnet18", size: int | None = None, width: int = 16) -> Network:
    """Networks around one of timm's, as people write them for inputs that are not one batch of images."""
    if name == "sequence":
        return Network(
            _Sequence(width),
            (torch.randn(BATCH, 1, 1024),),
            [(f"stages.{number}", None) for number in range(4)],
            sequence=True,
        )
    import timm

    side = size or 64
    model = {"table": _WithTable, "streams": _Streams, "siamese": _Siamese, "list": _OfList}[name](
        lambda: timm.create_model(net, num_classes=16)
    )
    example: dict[str, tuple[Any, ...]] = {
        "table": (images(side), torch.randn(BATCH, 6)),
        "streams": (images(side), images(side).flip(3)),
        "siamese": (images(side), images(side).flip(3)),
        "list": (list(images(side)),),
    }
    features = [(f"net.{info['module']}", info["num_chs"]) for info in timm.create_model(net).feature_info]
    return Network(model, example[name], features)


class _WithTable(nn.Module):
    """An image and the numbers of a table beside it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net, self.table = make(), nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.classifier = nn.Linear(24, 3)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        joined = torch.cat([self.net(image), self.table(table)], 1)
        return cast("Tensor", self.classifier(joined))


class _Streams(nn.Module):
    """Colours and depths, each with a network of its own."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net, self.depth, self.classifier = make(), make(), nn.Linear(32, 3)

    def forward(self, colours: Tensor, depths: Tensor) -> Tensor:
        return cast("Tensor", self.classifier(torch.cat([self.net(colours), self.depth(depths)], 1)))


class _Siamese(nn.Module):
    """Whether two images show the same."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = make()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(self.net(one), self.net(other))


class _OfList(nn.Module):
    """A list of images, as detectors take them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = make()

    def forward(self, each: list[Tensor]) -> Tensor:
        return cast("Tensor", self.net(torch.stack(each)))


class _Sequence(nn.Module):
    """A residual network of sequences (N, C, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 7, 2, 3), nn.BatchNorm1d(width), nn.ReLU())
        widths = [width * 2**number for number in range(5)]
        self.stages = nn.Sequential(*map(_SequenceBlock, widths[:-1], widths[1:]))
        self.classifier = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.classifier(self.stages(self.stem(x)).mean(2)))


class _SequenceBlock(nn.Module):
    def __init__(self, width: int, after: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(width, after, 3, 2, 1),
            nn.BatchNorm1d(after),
            nn.ReLU(),
            nn.Conv1d(after, after, 3, 1, 1),
            nn.BatchNorm1d(after),
        )
        self.shortcut = nn.Conv1d(width, after, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))

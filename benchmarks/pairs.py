"""Teachers and students of the measurements, and their training step.

Axes: N batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.harness import save
from matchdistill import MatchingDistiller
from matchdistill.features import FeatureDistiller

CLASSES = 5  # of the labels; the networks may have more
Choice = Literal["all", "mobilenet_v2", "resnet18"]


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and where their features are taken.

    Attributes:
        teacher, student: make the networks.
        taps: (teacher tap, student tap), as of `MatchingDistiller`.
        unused: taps of the student that the original takes too, before the others, and does not use.
        reruns: whether the original takes each of the student's features by a run from the input.
    """

    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    taps: tuple[tuple[str, str], ...]
    unused: tuple[str, ...] = ()
    reruns: bool = False

    def networks(self, images: Tensor) -> tuple[nn.Module, nn.Module]:
        """Teacher and student, equal in every call, on the images' device.

        Untrained; their batch norms have random scales and shifts, and the statistics of the images, so that values are of
        the size that those of trained networks have.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            networks = self.teacher(), self.student()
            for network in networks:
                for module in network.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        nn.init.uniform_(module.weight, 0.5, 1.5)
                        nn.init.normal_(module.bias, 0, 0.2)
        for network in networks:
            _measure_statistics(network.to(images.device), images)
        return networks

    def distiller(self, images: Tensor, **options: Any) -> MatchingDistiller:
        """The networks in a distiller with the paper's loss, before a refresh."""
        return MatchingDistiller(*self.networks(images), self.taps, loss_weight="paper", example=images[:1], **options)

    def feature_distiller(self, images: Tensor, position: Callable[..., Any]) -> FeatureDistiller:
        """The networks in a distiller with another loss at the same positions."""
        return FeatureDistiller(*self.networks(images), self.taps, position, loss_weight=30.0, example=images[:1])


@torch.no_grad()
def _measure_statistics(network: nn.Module, images: Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def of_recipe(name: str, **own: Any) -> Pair:
    """The networks of torchvision and the taps of a packaged recipe."""
    from matchdistill.runs.recipe import load_recipe  # much that processes which are given a pair need not import

    config = load_recipe(name).config
    makers = [
        functools.partial(
            getattr(torchvision.models, network["name"].removeprefix("torchvision:")), **network["options"]
        )
        for network in (config["teacher"], config["student"])
    ]
    taps = tuple((first, second) for first, second in config["distillation"]["taps"])
    return Pair(*makers, taps, **own)


def _mobilenet_v2() -> Pair:
    """As in the paper's transfer: its strides, and its positions, of which the first is not used."""
    return of_recipe("cub200_resnet50_mobilenetv2", unused=("features.4.conv.1.2:input",), reruns=True)


def _resnet18() -> Pair:
    stages = [("layer1.2", "layer1.1"), ("layer2.3", "layer2.1"), ("layer3.5", "layer3.1"), ("layer4.2", "layer4.1")]
    taps = tuple((f"{teacher}.relu:input", f"{student}.relu:input") for teacher, student in stages)
    return Pair(torchvision.models.resnet50, torchvision.models.resnet18, taps)


def chosen(pair: Choice) -> dict[str, Pair]:
    """The pair of that name, or all of them, by "teacher -> student"."""
    makers = {"mobilenet_v2": _mobilenet_v2, "resnet18": _resnet18}
    return {f"resnet50 -> {name}": make() for name, make in makers.items() if pair in ("all", name)}


def by_pair(
    measurement: str,
    device: str,
    json: Path | None,
    pair: Choice,
    settings: dict[str, Any],
    measure: Callable[[str, Pair], dict[str, Any]],
) -> None:
    """Save the settings, and what is measured of each chosen pair as soon as it is there."""
    results = {**settings, "pairs": {}}
    for name, each in chosen(pair).items():
        results["pairs"][name] = measure(name, each)
        save(json, measurement, device, results)


def random_batch(size: int, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random images (N, 3, H, W) and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def training_step(
    forward: Callable[[Tensor], tuple[Tensor, Tensor | float]],
    parameters: Iterable[nn.Parameter],
    images: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """A step of training on the same batch again and again, with the loss that `forward` adds to the task's.

    Called under autocast, its forward passes and its loss run so.
    """

    def loss() -> Tensor:
        output, added = forward(images)
        return F.cross_entropy(output, labels) + added

    return step_by(loss, parameters)


def step_by(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """A step of training by a loss, which alone runs under autocast."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        found = loss()
        with torch.autocast(found.device.type, enabled=False):
            found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step

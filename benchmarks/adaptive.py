"""How many images a refresh needs: an adaptive one beside one of the paper's 20,000, and one without images of its own.

Features of a ResNet-50 and of a ResNet-18, each trained for a while on Fashion-MNIST, on other real images of it.

Axes: N batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.harness import save
from matchdistill import MatchingDistiller
from matchdistill.data.tensors import FASHION_CLASSES, TensorDataset, find_fashion_mnist, load_fashion_mnist
from matchdistill.matching import objective
from matchdistill.refresh import FIRST_CHECK, doublings

BATCH = 64


class Batches:
    """Images (N, 3, H, W) and labels (N,) of the numbers, in their order, made as they are asked for."""

    def __init__(self, data: TensorDataset, numbers: Tensor, device: str) -> None:
        self.data, self.parts, self.device = data, numbers.split(BATCH), device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.parts:
            images, labels = self.data.__getitems__(part.tolist())
            yield images.to(self.device), labels.to(self.device)


def trained(network: nn.Module, data: TensorDataset, numbers: Tensor, device: str) -> nn.Module:
    """The network after one pass over the numbers."""
    network.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    loss = torch.zeros(())
    for images, labels in Batches(data, numbers, device):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{type(network).__name__}: the last training loss is {loss.item():.3f}", flush=True)
    return network


def excess(distiller: MatchingDistiller, full: list[tuple[Tensor, float]]) -> list[float]:
    """How much more the matching of each position costs, relatively, than that of all images, on all of them."""
    pairs = zip(distiller.positions, full, strict=True)
    return [objective(cost, position.index) / least - 1 for position, (cost, least) in pairs]


def measure(
    distiller: MatchingDistiller, data: TensorDataset, numbers: Tensor, tolerance: float, orders: int, device: str
) -> dict[str, Any]:
    """Adaptive refreshes over the images in some orders, refreshes of fixed numbers, and what their matchings lack."""

    def refreshed(order: Tensor, **options: Any) -> dict[str, Any]:
        start = time.perf_counter()
        matchings = distiller.refresh(Batches(data, order, device), **options)
        return {"images": matchings[0].images, "seconds": time.perf_counter() - start}

    results: dict[str, Any] = {"positions": [position.name for position in distiller.positions]}
    results["full"] = refreshed(numbers, max_images=len(numbers))
    full = [(position.matching.cost, position.matching.mean_cost) for position in distiller.positions]

    def tried(**options: Any) -> dict[str, Any]:
        found = refreshed(numbers[torch.randperm(len(numbers))], **options)
        found["excess"] = excess(distiller, full)
        print(found, flush=True)
        return found

    results["adaptive"] = [tried(max_images=len(numbers), tolerance=tolerance) for _ in range(orders)]
    results["fixed"] = [tried(max_images=count) for count in doublings(FIRST_CHECK, min(5000, len(numbers)))]
    return results


def networks(size: int, train: int, root: Path | None, device: str) -> tuple[MatchingDistiller, TensorDataset, Tensor]:
    """Teacher and student, the images, and the numbers of those that neither was trained on."""
    torch.manual_seed(0)
    data = TensorDataset(load_fashion_mnist(find_fashion_mnist(root, download=False))[0].resized(size))
    numbers = torch.randperm(len(data))
    both = [
        trained(make(num_classes=len(FASHION_CLASSES)), data, numbers[:train], device)
        for make in (torchvision.models.resnet50, torchvision.models.resnet18)
    ]
    example = torch.zeros(2, 3, size, size, device=device)
    return MatchingDistiller(both[0], both[1], example=example), data, numbers[train:]


def measure_online(
    distiller: MatchingDistiller, data: TensorDataset, numbers: Tensor, steps: int, every: int, device: str
) -> dict[str, Any]:
    """What the matching by the features of steps that change the student lacks to one of images with the student after them.

    The first images are those of the steps, all are those of the other matching.
    """
    taken = numbers[: steps * BATCH]
    distiller.refresh(Batches(data, taken[: 4 * BATCH], device))
    distiller.online = every
    optimizer = torch.optim.SGD(distiller.parameters(), 0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    distiller.train()
    for images, labels in Batches(data, taken, device):
        output, loss = distiller(images)
        optimizer.zero_grad()
        (F.cross_entropy(output, labels) + loss).backward()
        optimizer.step()
    before = [position.index.clone() for position in distiller.positions]
    summed = distiller.refresh()[0].images
    online = [position.index.clone() for position in distiller.positions]
    matchings = distiller.refresh(Batches(data, numbers, device), max_images=len(numbers))

    def lacks(indices: list[Tensor]) -> list[float]:
        pairs = zip(matchings, indices, strict=True)
        return [objective(matching.cost, index) / matching.mean_cost - 1 for matching, index in pairs]

    return {
        "steps": steps,
        "every": every,
        "images": {"online": summed, "full": matchings[0].images},
        "excess": {"online": lacks(online), "kept": lacks(before)},
    }


def run(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    size: int = 64,
    images: int = 20_000,
    train: int = 6_000,
    tolerance: float = 1e-3,
    orders: int = 3,
    root: Path | None = None,
) -> None:
    """Refresh with a tolerance, and set the matching beside that of many more images.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        size: pixels of a side of the images.
        images: images of the full refresh.
        train: other images that both networks are trained on.
        tolerance: of the adaptive refresh.
        orders: how many orders of the images it is tried on.
        root: folder of Fashion-MNIST; default: where Debian's package has it.
    """
    distiller, data, numbers = networks(size, train, root, device)
    found = measure(distiller, data, numbers[:images], tolerance, orders, device)
    save(json, "adaptive", device, {"size": size, "trained on": train, "tolerance": tolerance, **found})


def run_online(
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
    size: int = 64,
    images: int = 5_000,
    train: int = 6_000,
    steps: int = 60,
    every: int = 10,
    root: Path | None = None,
) -> None:
    """Match by what training steps have summed, and set that beside a matching of images with the student after them.

    Args:
        device: where.
        json: file of the results; default: under benchmarks/results/speed.
        size: pixels of a side of the images.
        images: images of the other matching.
        train: other images that both networks are trained on.
        steps: of the distillation, of 64 images each.
        every: steps from one that sums to the next.
        root: folder of Fashion-MNIST; default: where Debian's package has it.
    """
    distiller, data, numbers = networks(size, train, root, device)
    found = measure_online(distiller, data, numbers[:images], steps, every, device)
    print(found, flush=True)
    save(json, "online-matching", device, {"size": size, "trained on": train, **found})

"""lightly-train's distillation of features beside the library's: steps in turn, and the most memory that each holds.

Neither has labels. The last maps of both networks are distilled. lightly-train has a linear projection of each place and one
of the pooled features. It needs an environment with both packages:

    pip install lightly-train .
    python -m benchmarks.peers.lightly_train_step
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.harness import RESULTS
from benchmarks.pairs import Pair, chosen, random_batch, step_by
from benchmarks.peers.steps import beside
from matchdistill.baselines import FitNetsPosition

QUEUE = 2048  # pooled features that lightly-train keeps: its choice for 10,000 images
Maker = Callable[[Pair, Tensor], Callable[[], None]]


def body(network: nn.Module) -> nn.Module:
    """A residual network up to its last map."""
    network.avgpool, network.fc = nn.Identity(), nn.Identity()
    return network


def alone(pair: Pair, images: Tensor) -> Callable[[], None]:
    """A step of the student by some loss of its last map."""
    student = body(pair.networks(images)[1])
    return step_by(lambda: student(images).square().mean(), student.parameters())


def limit(pair: Pair, images: Tensor) -> Callable[[], None]:
    """The same, and a forward pass of the teacher, which nothing is done with."""
    teacher, student = map(body, pair.networks(images))
    teacher.eval()

    def loss() -> Tensor:
        with torch.inference_mode():
            teacher(images)
        found: Tensor = student(images).square().mean()
        return found

    return step_by(loss, student.parameters())


def matchdistill(pair: Pair, images: Tensor) -> Callable[[], None]:
    """The matching, found on the same batch."""
    distiller = pair.distiller(images)
    distiller.refresh([images])
    return step_by(lambda: distiller(images)[1], distiller.parameters())


def fitnets(pair: Pair, images: Tensor) -> Callable[[], None]:
    """FitNets with a 1x1 adapter."""
    distiller = pair.feature_distiller(images, FitNetsPosition)
    return step_by(lambda: distiller(images)[1], distiller.parameters())


def peer(pair: Pair, images: Tensor) -> Callable[[], None]:
    """lightly-train's method of distilling."""
    from lightly_train._methods.distillationv3.distillationv3 import (
        DistillationV3,
        DistillationV3AdamWArgs,
        DistillationV3Args,
    )
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._models.package_helpers import get_wrapped_model

    teacher, student = (get_wrapped_model(network, num_input_channels=3) for network in pair.networks(images))
    method = DistillationV3(
        method_args=DistillationV3Args(teacher=teacher, queue_size=QUEUE),
        optimizer_args=DistillationV3AdamWArgs(),
        embedding_model=EmbeddingModel(student),
        global_batch_size=len(images),
        num_input_channels=3,
    )
    method.train()
    method.teacher_embedding_model.eval()
    parameters = [value for value in method.parameters() if value.requires_grad]
    return step_by(lambda: method.training_step_impl({"views": [images]}, 0).loss, parameters)


WORKS: dict[str, Maker] = {
    "limit": limit,
    "matchdistill": matchdistill,
    "fitnets": fitnets,
    "lightly-train": peer,
    "alone": alone,
}


def last(pair: Pair) -> Pair:
    """A pair of residual networks with their last maps as taps."""
    return Pair(pair.teacher, pair.student, (("layer4:output", "layer4:output"),))


def run(
    json: Path = RESULTS / "peers_lightly_train_cpu.json", size: int = 64, batch: int = 16, rounds: int = 12
) -> None:
    """Time steps of resnet50 -> resnet18 with their last maps distilled, and measure the most memory.

    Args:
        json: file of the results.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
    """
    images, _ = random_batch(size, batch)
    (pair,) = chosen("resnet18").values()
    works = {name: functools.partial(make, last(pair), images) for name, make in WORKS.items()}
    beside("lightly-train", works, json, rounds, size=size, batch=batch)


if __name__ == "__main__":
    auto_cli(run)

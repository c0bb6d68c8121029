"""Whether a network is a classifier for the data, and where its logits are.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import nn

from matchdistill.messages import cause
from matchdistill.probing import scratch
from matchdistill.tasks.classification.logits import Place, logits_place, tensor_at

# The teacher sees the student's images, whose size is not its own to choose.
OTHER_SIZE = {"teacher": "; if it takes another size, give that as teacher.preparation.size"}


class Sized(Protocol):
    """What has to be known of images with classes: their height and width in pixels, and how many classes there are."""

    @property
    def image_size(self) -> int: ...

    @property
    def num_classes(self) -> int: ...


def example_images(data: Sized) -> torch.Tensor:
    """Images (2, 3, H, W) of the data's size."""
    return torch.zeros(2, 3, data.image_size, data.image_size)


def check_classes(model: nn.Module, data: Sized, role: str) -> None:
    """Raise a ValueError unless the model maps images of the data to one logit per class."""
    images = example_images(data)
    try:
        with torch.no_grad(), scratch(model) as probe:
            output = probe.eval()(images)
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the {role} does not take images of shape {tuple(images.shape[1:])}: {cause(error)}{OTHER_SIZE.get(role, '')}"
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (len(images), data.num_classes):
        raise ValueError(
            f"the {role} gives {shape} for {len(images)} images, but the data has {data.num_classes} classes: expected "
            f"({len(images)}, {data.num_classes})"
        )


def training_logits(student: nn.Module, data: Sized) -> Place:
    """Where a student's output in training mode, which may be another than in evaluation, holds the logits.

    Raises:
        ValueError: it has none, or the student cannot be trained on images alone.
    """
    images = torch.randn(example_images(data).shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), scratch(student) as probe:
            output = probe.train()(images)
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the student does not take images of shape {tuple(images.shape[1:])} in training mode: {cause(error)}"
        ) from error
    try:
        place = logits_place(output, data.num_classes)
    except ValueError as error:
        raise ValueError(f"in training mode the student {error}") from error
    # With its parts in evaluation mode, it gives the logits of evaluation mode where those of training mode are.
    with contextlib.suppress(Exception), torch.no_grad(), scratch(student) as probe:
        logits = probe.eval()(images)
        probe.training = True
        alike = logits_place(probe(images), data.num_classes, logits)
        if tensor_at(output, alike).shape == logits.shape:
            place = alike
    return place

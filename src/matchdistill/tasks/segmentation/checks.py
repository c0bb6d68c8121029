"""Whether a network gives every pixel of the data a class, and can be trained to.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matchdistill.messages import cause
from matchdistill.probing import scratch
from matchdistill.tasks.segmentation.outputs import Outputs, fitted, outputs_in


def check_segmenter(network: nn.Module, images: Tensor, num_classes: int, role: str) -> None:
    """Raise a ValueError unless a network maps images (N, 3, H, W) to logits of as many classes.

    Args:
        network: the network.
        images: of the data's size.
        num_classes: number of classes.
        role: "student" or "teacher".
    """
    with torch.no_grad(), scratch(network) as probe:
        found = _outputs(probe.eval(), images, role)
    _check_shape(found.logits, images, num_classes, role)


def check_training(network: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raise a ValueError unless a student in training mode gives logits that can be trained.

    Args:
        network: the student.
        images: (N, 3, H, W) of the data's size.
        num_classes: number of classes.
    """
    role = "student in training mode"
    with torch.no_grad(), scratch(network) as probe:
        found = _outputs(probe.train(), images, role)
    for logits in (found.logits, *([] if found.aux is None else [found.aux])):
        _check_shape(logits, images, num_classes, role)


def _outputs(network: nn.Module, images: Tensor, role: str) -> Outputs:
    try:
        output = network(fitted([network], images))
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the {role} does not take images of shape {tuple(images.shape[1:])}: {cause(error)}"
        ) from error
    try:
        return outputs_in(output)
    except ValueError as error:
        raise ValueError(f"the {role} {error}") from error


def _check_shape(logits: Tensor, images: Tensor, num_classes: int, role: str) -> None:
    if logits.ndim != 4 or logits.shape[:2] != (len(images), num_classes):
        raise ValueError(
            f"the {role} gives {tuple(logits.shape)} for {len(images)} images, but the data has {num_classes} classes: "
            f"expected ({len(images)}, {num_classes}, height, width)"
        )

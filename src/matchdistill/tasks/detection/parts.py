"""What is distilled of a detector: the parts whose features are taken, and which pixels of its batches are images.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from matchdistill.choice import find_taps
from matchdistill.taps import Tap


def distilled_part(model: nn.Module, pyramid: bool) -> nn.Module:
    """The part of a detector whose features are distilled: the body of its backbone, or all of that with the pyramid."""
    backbone = model.get_submodule("backbone")
    body = getattr(backbone, "body", None)
    return body if isinstance(body, nn.Module) and not pyramid else backbone


def detector_taps(teacher: nn.Module, student: nn.Module) -> list[tuple[Tap, Tap]]:
    """The automatic taps of two bodies and the levels of their pyramids, as taps of the backbones.

    Raises:
        ValueError: they have no pyramids, or pyramids of different numbers of levels; or `find_taps` finds no taps.
    """
    levels = []
    for model in (teacher, student):
        blocks = getattr(getattr(model.backbone, "fpn", None), "layer_blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            kind = type(model.backbone).__name__
            raise ValueError(f"distillation.pyramid needs a backbone with a feature pyramid at 'fpn': {kind} has none")
        levels.append([Tap(f"fpn.layer_blocks.{number}") for number in range(len(blocks))])
    if len(levels[0]) != len(levels[1]):
        raise ValueError(
            f"the teacher's pyramid has {len(levels[0])} levels, the student's {len(levels[1])}: give distillation.taps"
        )
    bodies = [distilled_part(model, pyramid=False) for model in (teacher, student)]
    found = find_taps(bodies[0], bodies[1])
    inside = [[tap.within("body") for tap in pair] for pair in found]
    return [(first, second) for first, second in [*inside, *zip(*levels, strict=True)]]


@contextlib.contextmanager
def padded_batches(model: nn.Module) -> Iterator[list[ImageList]]:
    """The batches that a detector makes of lists of images in a block, resized and padded."""
    seen: list[ImageList] = []
    # Only here, as a hook that stays would be copied, and saved, with the model.
    handle = model.get_submodule("transform").register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()


def pixel_mask(batch: ImageList) -> Tensor | None:
    """Which pixels of a padded batch belong to an image: bool (N, H, W); None where all of them do."""
    height, width = batch.tensors.shape[-2:]
    if all(tuple(size) == (height, width) for size in batch.image_sizes):
        return None
    device = batch.tensors.device
    sizes = torch.tensor(batch.image_sizes, device=device)
    rows = torch.arange(height, device=device) < sizes[:, :1]
    columns = torch.arange(width, device=device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]

"""Whether a network is a detector that can be trained on the data, and distilled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.messages import cause
from matchdistill.probing import scratch
from matchdistill.tasks.detection.parts import padded_batches


def check_detector(model: nn.Module, masks: bool, role: str) -> None:
    """Raise a ValueError unless a model has torchvision's API of detectors.

    Args:
        model: the model.
        masks: whether its detections need masks.
        role: "student" or "teacher".
    """
    for part in ("backbone", "transform"):
        if not isinstance(getattr(model, part, None), nn.Module):
            raise ValueError(
                f"the {role} ({type(model).__name__}) has no {part}: expected a detector that is made as torchvision's are"
            )
    wanted = ["boxes", "scores", "labels", *(["masks"] if masks else [])]
    try:
        with torch.no_grad(), scratch(model) as probe, padded_batches(probe) as batches:
            found = probe.eval()([torch.zeros(3, 48, 64)])
        missing = [name for name in wanted if name not in found[0]]
        of_batch = [tuple(size) for size in batches[0].image_sizes]
    except Exception as error:  # user code can fail in every way
        raise ValueError(f"the {role} does not take a list of images (3, H, W): {cause(error)}") from error
    if missing:
        raise ValueError(f"the {role}'s detections have no {', '.join(missing)}: expected {', '.join(wanted)}")
    assert len(of_batch) == 1


def check_targets(model: nn.Module, masks: bool) -> None:
    """Raise a ValueError if a detector of torchvision's is trained on what the data does not give.

    Args:
        model: the student.
        masks: whether the data gives masks beside boxes.
    """
    heads = getattr(model, "roi_heads", None)
    kind = type(model).__name__
    if not masks and getattr(heads, "mask_head", None) is not None:
        raise ValueError(
            f"the student ({kind}) learns masks, which the data does not give: set data.masks to true, or take a detector "
            "of boxes, such as faster_rcnn"
        )
    if getattr(heads, "keypoint_head", None) is not None:
        raise ValueError(
            f"the student ({kind}) learns keypoints, which the data has none of: take a detector of boxes or masks"
        )


def check_same_input(teacher: nn.Module, student: nn.Module, names: Sequence[str]) -> None:
    """Raise a ValueError unless two networks prepare images alike: the teacher is run on the student's batches.

    Args:
        teacher: what prepares its images.
        student: likewise.
        names: attributes that say how; what one of them has not is not compared.
    """
    for name in names:
        first, second = (_plain(getattr(each, name, None)) for each in (teacher, student))
        if None not in (first, second) and first != second:
            raise ValueError(
                f"the teacher's {name} is {first}, the student's {second}: expected the same, as the teacher is run on the "
                "images as the student has prepared them"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    return list(value) if isinstance(value, tuple) else value

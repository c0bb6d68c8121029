"""What a run's page shows of validation images: what is true, and what student and teacher make of them.

Axes: H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from matchdistill.report.runs import Run

ROLES = ("truth", "teacher", "student")
KINDS = ("words", "boxes", "pictures")


def gallery(run: Run) -> list[dict[str, Any]]:
    """The shown validation images, each with the "words", "boxes" or drawn "pictures" of its roles."""
    if run.pictures is None:
        return []
    tensors, told = run.pictures
    return [
        described(tensors, number, each, f"validation image {number + 1}") for number, each in enumerate(told["images"])
    ]


def described(tensors: Mapping[str, Tensor], number: int, told: Mapping[str, Any], alt: str) -> dict[str, Any]:
    """An image of a file of pictures by its place there, with the "words", "boxes" or drawn "pictures" of its roles."""
    image = tensors[f"image{number}"]
    own = {role: told[role] for role in ROLES if role in told}
    return {
        "source": _picture(image),
        "width": image.shape[2],
        "height": image.shape[1],
        "alt": alt,
        "title": "",
        "file": told.get("file", ""),
        "words": {role: each for role, each in own.items() if isinstance(each, str)},
        "boxes": {role: _boxes(each) for role, each in own.items() if isinstance(each, list)},
        "pictures": {
            role: {"source": _picture(tensors[f"drawn {role}{number}"]), "words": each["words"]}
            for role, each in own.items()
            if isinstance(each, dict)
        },
    }


def compared(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The images of `gallery` with what the students of several methods find, each of its first run that has any."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.method not in shown and (images := gallery(run)):
            shown[run.method] = images
    found = []
    for image in zip(*shown.values(), strict=False):
        merged = dict(image[0])
        for kind in KINDS:
            shared = {role: each for own in image for role, each in own[kind].items() if role != "student"}
            students = {method: own[kind].get("student") for method, own in zip(shown, image, strict=True)}
            merged[kind] = shared | {method: each for method, each in students.items() if each is not None}
        found.append(merged)
    return found


def _boxes(found: list[list[Any]]) -> list[dict[str, Any]]:
    """Boxes as shares of the image, with what they are called."""
    return [
        {
            "text": label if score is None else f"{label} {score:.0%}",
            "x": left,
            "y": top,
            "width": right - left,
            "height": bottom - top,
        }
        for label, score, left, top, right, bottom in found
    ]


def _picture(pixels: Tensor) -> str:
    """An image (3, H, W) of bytes."""
    return embedded(Image.fromarray(np.ascontiguousarray(pixels.movedim(0, 2).numpy())), "JPEG", quality=85)


def embedded(image: Image.Image, form: str, **options: Any) -> str:
    """An image as an address that a page holds itself."""
    written = io.BytesIO()
    image.save(written, form, optimize=True, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"

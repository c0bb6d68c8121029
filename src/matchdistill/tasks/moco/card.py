"""What the model card and the config.json of an encoder say."""

from __future__ import annotations

import math
from typing import Any

from matchdistill.data.images import preparation
from matchdistill.tasks.task import Card, python_block


def encoder_card(described: dict[str, Any], data_set: str) -> Card:
    """What goes with an exported encoder.

    Args:
        described: the student, as `model.json` has it.
        data_set: the name of the data set, by which images are prepared.
    """
    prepared = preparation(data_set, described["image_size"])
    size, share = described["image_size"], prepared["crop_pct"]
    resized = f"resized to {math.floor(size / share)} px (the shorter side), of which the middle {size} px are taken"
    images = (
        f"Images (N, 3, {size}, {size}): {resized if share < 1 else f'resized to {size} px'}, scaled to 0..1 and normalised "
        f"by mean {prepared['mean']} and deviation {prepared['std']}. The output is the pooled features (N, width) of the "
        "network without its head."
    )
    config = {"name": described["name"], "options": described["options"], **prepared}
    rows = {"image size": f"{size} x {size} px"}
    return Card("image-feature-extraction", "matchdistill", config, rows, images, lambda *file: _use(described, *file))


def _use(described: dict[str, Any], kind: str, file: str) -> str:
    """The code that loads a file, given its format and name."""
    if kind == "safetensors":
        options = f", **{described['options']!r}" if described["options"] else ""
        return python_block(
            "from matchdistill.models import build_body, load_weights\n"
            f"model = build_body({described['name']!r}{options}).eval()\n"
            f'load_weights(model, "{file}")'
        )
    if kind == "onnx":
        return python_block(
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
            'outputs = session.run(None, {"images": images.numpy()})'
        )
    return python_block(f'import torch\nmodel = torch.export.load("{file}").module()\nfeatures = model(images)')

"""What the model card and the config.json of an encoder say."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from matchdistill.tasks.classification.card import classifier_card
from matchdistill.tasks.task import CONFIG, Card, python_block


def encoder_card(student: nn.Module, described: dict[str, Any], width: int) -> Card:
    """What goes with an exported encoder.

    Args:
        student: the network.
        described: the student, as `model.json` has it.
        width: of its pooled features.
    """
    # Of matchdistill, though it may be timm's: timm's loaders would expect a classifier.
    plain = classifier_card(student, {**described, "name": f"matchdistill:{described['name']}"})
    config = {**plain.config, "name": described["name"], "num_features": width}
    sentences = plain.images.partition(f" `{CONFIG}`")[0]
    rows = {**plain.rows, "features": f"{width} for an image: the pooled output of the network, which has no head"}
    use = functools.partial(_use, described)
    return Card("image-feature-extraction", "matchdistill", config, rows, sentences, use)


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

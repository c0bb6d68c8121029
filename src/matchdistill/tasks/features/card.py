"""What the model card and the config.json of a backbone say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from matchdistill.tasks.classification.card import classifier_card
from matchdistill.tasks.features.pooling import find_pooling, part_of
from matchdistill.tasks.task import Card, python_block, weights_code


def backbone_card(student: nn.Module, described: dict[str, Any]) -> Card:
    """What goes with an exported backbone.

    Args:
        student: the network.
        described: the student, as `model.json` has it.
    """
    # Of matchdistill, though it may be timm's: timm's loaders would expect a classifier.
    neutral = described["name"].replace("timm:", "matchdistill:")
    plain = classifier_card(student, {**described, "name": neutral})
    size, part = described["image_size"], described.get("part")
    images = torch.zeros(2, 3, size, size)
    pooling = find_pooling(part_of(student), images, "student")
    with torch.no_grad():
        width = pooling(part_of(student.eval()), images).shape[1]
    # Of transformers' the classifier's card has the type: the folder that the network was built from may be elsewhere.
    named = {} if described["name"].startswith("transformers:") else {"name": described["name"]}
    config = {**plain.config, **named, "num_features": width, **({"part": part} if part else {})}
    place = f"`{part}`" if part else "the network"
    where = f"the output of {place}" if pooling.head is None else f"what the layer `{pooling.head}` of {place} is given"

    def use(kind: str, file: str) -> str:
        if kind == "safetensors":
            options = {**config["options"]}
            headless = {**config, "num_classes": options.pop("num_classes", None), "options": options}
            return weights_code("build_model", headless, file)
        if kind == "onnx":
            return python_block(
                f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
                'features = session.run(None, {"images": images.numpy()})[0]'
            )
        return python_block(f'import torch\nmodel = torch.export.load("{file}").module()\nfeatures = model(images)')

    sentences = plain.images.partition(" `config.json`")[0]
    rows = {**plain.rows, "features": f"{width} for an image: {where}, averaged over positions where it has some"}
    return Card("image-feature-extraction", "matchdistill", config, rows, sentences, use)

"""What the model card and the config.json of a classifier say."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from matchdistill.data.images import IMAGE_SETS, preparation
from matchdistill.tasks.task import CONFIG, Card, python_block, weights_code


def classifier_card(student: nn.Module, described: dict[str, Any], data_set: str) -> Card:
    """What goes with an exported classifier.

    Args:
        student: the network.
        described: the student as of `model.json`.
        data_set: the name of the data set, by which images are prepared.
    """
    library, _, name = described["name"].partition(":")
    prepared = preparation(data_set, described["image_size"])
    size, share = described["image_size"], prepared["crop_pct"]
    resized = f"resized to {math.floor(size / share)} px (the shorter side), of which the middle {size} px are taken"
    images = (
        f"Images (N, 3, {size}, {size}): {resized if share < 1 else f'resized to {size} px'}, scaled to 0..1 and normalised "
        f"by mean {prepared['mean']} and deviation {prepared['std']}. `{CONFIG}` has the names of the classes."
    )
    rows = {"image size": f"{size} x {size} px"}
    gray = {"gray": True} if data_set in IMAGE_SETS and IMAGE_SETS[data_set].small else {}

    def use(kind: str, file: str) -> str:
        if kind == "safetensors" and library == "timm":
            return python_block(
                "import timm\n"
                'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            )
        if kind == "safetensors":
            return weights_code("build_model", described, file)
        if kind == "onnx":
            return python_block(
                f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
                'outputs = session.run(None, {"images": images.numpy()})'
            )
        return python_block(f'import torch\nmodel = torch.export.load("{file}").module()\nlogits = model(images)')

    if library == "timm":
        config = _of_timm(student, name, described, prepared) | gray
        return Card("image-classification", "timm", config, rows, images, use)
    known = library if library == "torchvision" else "matchdistill"
    config = {"name": described["name"], "options": described["options"], **prepared, **gray}
    return Card("image-classification", known, config, rows, images, use)


def _of_timm(student: nn.Module, name: str, described: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """As timm's own loaders want it."""
    known = dict(getattr(student, "pretrained_cfg", {}))
    structure = {key: known[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in known}
    return {
        "architecture": name.partition(".")[0],
        "num_features": getattr(student, "num_features", None),
        **({"model_args": described["options"]} if described["options"] else {}),
        "pretrained_cfg": {**structure, "custom_load": False, "num_classes": described["num_classes"], **prepared},
    }

"""What the model card and the config.json of a classifier say."""

from __future__ import annotations

from typing import Any

from torch import nn

from matchdistill.models import Preparation
from matchdistill.models.huggingface import described_config, processor_config
from matchdistill.models.huggingface_images import PROCESSOR
from matchdistill.tasks.task import CONFIG, Card, python_block, weights_code


def classifier_card(student: nn.Module, described: dict[str, Any]) -> Card:
    """What goes with an exported classifier.

    Args:
        student: the network.
        described: the student, as `model.json` describes it.
    """
    library, _, name = described["name"].partition(":")
    preparation, size = Preparation.of(described["preparation"]), described["image_size"]
    prepared = preparation.words(size)
    images = (
        f"Images (N, 3, {size}, {size}): {_resized(preparation, size, described['gray'])}, scaled to 0..1 and normalised "
        f"by mean {prepared['mean']} and deviation {prepared['std']}. `{CONFIG}` has the names of the classes."
    )
    rows = {"image size": f"{size} x {size} px"}
    # Exact, where the words of timm are rounded for the size of the images.
    exact = {"preparation": described["preparation"], **({"gray": True} if described["gray"] else {})}

    def use(kind: str, file: str) -> str:
        if kind == "safetensors" and library == "timm":
            return python_block(
                "import timm\n"
                'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            )
        if kind == "safetensors" and library == "transformers":
            return python_block(
                "from transformers import AutoModelForImageClassification\n"
                'model = AutoModelForImageClassification.from_pretrained("USER/NAME").eval()  # or the folder'
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
        config = _of_timm(student, name, described, prepared) | exact
        return Card("image-classification", "timm", config, rows, images, use)
    if library == "transformers":
        own, options, written = described_config(student, described["class_names"])
        # Of the network by its type: the folder that it was built from may be elsewhere.
        config = {**written, "name": own, "options": options, **prepared, **exact}
        processor = None if described["gray"] else processor_config(preparation, size)
        beside = {} if processor is None else {PROCESSOR: processor}
        return Card("image-classification", "transformers", config, rows, images, use, beside)
    known = library if library == "torchvision" else "matchdistill"
    config = {"name": described["name"], "options": described["options"], **prepared, **exact}
    return Card("image-classification", known, config, rows, images, use)


def _resized(preparation: Preparation, size: int, gray: bool) -> str:
    """How pictures become squares."""
    resized = preparation.uncropped(size)
    if gray:
        return f"resized to {size} px"
    by = "" if preparation.interpolation == "bilinear" else f", {preparation.interpolation}"
    sides = {"center": "the shorter side", "squash": "both sides", "border": "the longer side"}[preparation.crop_mode]
    return f"resized to {resized} px ({sides}{by}), of which the middle {size} px are taken"


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

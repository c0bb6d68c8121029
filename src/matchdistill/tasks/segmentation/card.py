"""What the model card and the config.json of a network that gives every pixel a class say."""

from __future__ import annotations

from typing import Any

from torch import nn

from matchdistill.models import Preparation
from matchdistill.models.huggingface import described_config, pixel_processor_config
from matchdistill.models.huggingface_images import PROCESSOR
from matchdistill.tasks.task import CONFIG, Card, python_block, weights_code


def segmenter_card(student: nn.Module, described: dict[str, Any]) -> Card:
    """What goes with an exported student.

    Args:
        student: the network.
        described: the student, as `model.json` has it.
    """
    preparation = Preparation.of(described["preparation"])
    size, library = described["size"], described["name"].partition(":")[0]
    config = {
        "name": described["name"],
        "options": described["options"],
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "size": size,
    }
    resized = "" if size is None else f"resized so that the shorter side has {size} px, "
    images = (
        f"Images (N, 3, H, W) of any height and width: {resized}scaled to 0..1 and normalised by mean {preparation.mean} "
        f"and deviation {preparation.std}. The class of a pixel is the largest of its logits; `{CONFIG}` has the names "
        "of the classes. Logits of a coarser map are resized to the image first, by bilinear interpolation."
    )

    def use(kind: str, file: str) -> str:
        if kind == "safetensors" and library == "transformers":
            return python_block(
                "from transformers import AutoModelForSemanticSegmentation\n"
                'model = AutoModelForSemanticSegmentation.from_pretrained("USER/NAME").eval()  # or the folder'
            )
        if kind == "safetensors":
            return weights_code("build_segmenter", described, file)
        return python_block(
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
            'logits = session.run(None, {"images": images.numpy()})[0]'
        )

    if library == "transformers":
        own, options, written = described_config(student, described["class_names"])
        # Of the network by its type: the folder that it was built from may be elsewhere.
        config = {**written, **config, "name": own, "options": options}
        beside = {PROCESSOR: pixel_processor_config(preparation, size)}
        return Card("image-segmentation", "transformers", config, {}, images, use, beside)
    known = library if library == "torchvision" else "matchdistill"
    return Card("image-segmentation", known, config, {}, images, use)

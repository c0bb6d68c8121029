"""What the model card and the config.json of a detector say."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from matchdistill.models.huggingface import PROCESSOR, described_config
from matchdistill.models.huggingface_detection import TransformersDetector
from matchdistill.tasks.task import CONFIG, Card, python_block, weights_code


def detector_card(student: nn.Module, described: dict[str, Any]) -> Card:
    """What goes with an exported detector.

    Args:
        student: the network.
        described: the student, as `model.json` has it.
    """
    images = "RGB in 0..1, of any size; the model resizes them"
    config = {
        "name": described["name"],
        "options": described["options"],
        "category_ids": described["category_ids"],
        "images": images,
    }

    def use(kind: str, file: str) -> str:
        if kind == "safetensors" and isinstance(student, TransformersDetector):
            return python_block(
                "from transformers import AutoImageProcessor, AutoModelForObjectDetection\n"
                'model = AutoModelForObjectDetection.from_pretrained("USER/NAME").eval()  # or the folder\n'
                'processor = AutoImageProcessor.from_pretrained("USER/NAME")'
            )
        if kind == "safetensors":
            return weights_code("build_detector", described, file)
        return python_block(
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
            'outputs = session.run(None, {"image": image.numpy()})'
        )

    said = f"Images (3, H, W): {images}. `{CONFIG}` has the names and ids of the categories."
    if isinstance(student, TransformersDetector):
        own, options, written = described_config(student.model, described["class_names"])
        # Of the network by its type: the folder that it was built from may be elsewhere.
        config = {**written, **config, "name": own, "options": {**options, **_input(student.transform)}}
        said = f"The image processor resizes and normalises images. `{CONFIG}` has the names and ids of the categories."
        return Card("object-detection", "transformers", config, {}, said, use, {PROCESSOR: _processor_config(student)})
    library = described["name"].partition(":")[0]
    return Card("object-detection", library if library == "torchvision" else "matchdistill", config, {}, said, use)


def _input(transform: Any) -> dict[str, Any]:
    """How images are prepared, as options of `build_transformers_detector`."""
    sides = list(transform.min_size)
    return {
        "min_size": sides[0] if len(sides) == 1 else sides,
        "max_size": transform.max_size,
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
    }


def _processor_config(student: TransformersDetector) -> dict[str, Any]:
    """The `preprocessor_config.json` of an image processor that prepares images as the student sees them."""
    given = _input(student.transform)
    plain: dict[str, Any] = json.loads(student.processor.to_json_string())
    return {
        **plain,
        "do_resize": True,
        "size": {"shortest_edge": student.transform.min_size[-1], "longest_edge": given["max_size"]},  # type: ignore[index]
        "do_normalize": True,
        "image_mean": given["image_mean"],
        "image_std": given["image_std"],
        "do_pad": True,  # with a mask of the pixels that belong to an image
    }

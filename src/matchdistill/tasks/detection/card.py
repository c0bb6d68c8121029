"""What the model card and the config.json of a detector say."""

from __future__ import annotations

from typing import Any

from matchdistill.tasks.task import CONFIG, Card, python_block, weights_code


def detector_card(described: dict[str, Any]) -> Card:
    """What goes with an exported detector, described as in `model.json`."""
    images = "RGB in 0..1, of any size; the model resizes them"
    config = {
        "name": described["name"],
        "options": described["options"],
        "category_ids": described["category_ids"],
        "images": images,
    }

    def use(kind: str, file: str) -> str:
        if kind == "safetensors":
            return weights_code("build_detector", described, file)
        return python_block(
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file}")\n'
            'outputs = session.run(None, {"image": image.numpy()})'
        )

    library = described["name"].partition(":")[0]
    return Card(
        "object-detection",
        library if library == "torchvision" else "matchdistill",
        config,
        {},
        f"Images (3, H, W): {images}. `{CONFIG}` has the names and ids of the categories.",
        use,
    )

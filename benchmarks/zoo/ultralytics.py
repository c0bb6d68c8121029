"""Networks of Ultralytics."""

from __future__ import annotations

import os

from benchmarks.zoo.network import Network, images


def network(name: str, size: int | None = None) -> Network:
    os.environ["YOLO_VERBOSE"] = "False"
    from ultralytics.nn import tasks

    kinds = {"-cls": "Classification", "-seg": "Segmentation", "-pose": "Pose", "-obb": "OBB"}
    kind = next((kind for ending, kind in kinds.items() if ending in name), "Detection")
    made = tasks.RTDETRDetectionModel if name.startswith("rtdetr") else getattr(tasks, f"{kind}Model")
    model = made(f"{name}.yaml", **({} if kind == "Pose" else {"nc": 5}), verbose=False)
    backbone = len(model.yaml["backbone"])
    rest = "|".join(str(number) for number in range(backbone, len(model.model)))
    network = Network(model, (images(size or 128),), heads=rf"^model\.({rest})(\.|$)")
    network.features = [(f"model.{number}", None) for number in range(backbone)]
    return network

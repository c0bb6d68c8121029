"""Networks of torchvision."""

from __future__ import annotations

import re
from typing import Any

import torch

from benchmarks.zoo.network import BATCH, HEADS, Network, images, numbered

# The modules that return features, by the beginning of the name.
_FEATURES: list[tuple[str, tuple[str, ...]]] = [
    (r"(fcn|deeplabv3)_resnet", (r"backbone.layer#",)),
    (r"deeplabv3_mobilenet", (r"backbone.#",)),
    (r"lraspp", (r"backbone.#",)),
    # What follows of SSD are a pyramid's levels.
    (r"ssd300", (r"backbone.features.#", r"backbone.extra.0", r"backbone.extra.1")),
    (r"ssdlite", (r"backbone.features.0.#", r"backbone.features.1.#")),
    (r"fasterrcnn_mobilenet", (r"backbone.body.#",)),
    (r"fasterrcnn|maskrcnn|keypointrcnn|retinanet|fcos", (r"backbone.body.layer#",)),
    (r"(quantized_)?(resnet|resnext|wide)", (r"layer#",)),
    (r"r3d|mc3|r2plus1d", (r"layer#",)),
    (r"s3d", (r"features.#",)),
    (r"mvit", (r"blocks.#",)),
    (r"swin3d", (r"features.#.#",)),
    (r"swin", (r"features.#.#",)),
    (r"vit", (r"encoder.layers.encoder_layer_#",)),
    (r"convnext", (r"features.#",)),
    (r"efficientnet|(quantized_)?mobilenet", (r"features.#",)),
    (r"densenet", (r"features.denseblock#",)),
    (r"alexnet|vgg|squeezenet", (r"features.#",)),
    (r"(quantized_)?(googlenet|inception)", (r"(inception|Mixed_|conv|Conv2d_)*",)),
    (r"mnasnet", (r"layers.#",)),
    (r"maxvit", (r"blocks.#",)),
    (r"regnet", (r"trunk_output.block#",)),
    (r"(quantized_)?shufflenet", (r"stage#", "conv5")),
]


def network(name: str, size: int | None = None, **options: Any) -> Network:
    import torchvision

    models = torchvision.models
    made: Any = models.get_model_builder(name)
    options = {"weights": None, "num_classes": 5, **options}
    patterns = next((found for start, found in _FEATURES if re.match(start, name)))
    if re.match("fcn|deeplab|lraspp", name):
        model = made(weights_backbone=None, **options)
        return Network(model, (images(size or 64),), numbered(model, *patterns))
    if re.match("fasterrcnn|maskrcnn|keypointrcnn|retinanet|fcos|ssd", name):
        side = size or 128
        if not name.startswith("ssd"):
            options.update(min_size=side, max_size=side)
        model = made(weights_backbone=None, **options)
        return Network(
            model,
            (list(images(side)),),
            numbered(model, *patterns),
            heads=HEADS + r"|(^|\.)(rpn|anchor_\w+)(\.|$)",
        )
    if re.match("r3d|mc3|r2plus1d|s3d|mvit|swin3d", name):
        side, frames = size or (224 if name.startswith(("s3d", "mvit")) else 64), 16  # the others need not be so large
        model = made(**options)
        return Network(model, (torch.randn(BATCH, 3, frames, side, side),), numbered(model, *patterns))
    if name.startswith("vit"):
        options["image_size"] = size = size or 64
    if re.match("googlenet|inception", name):
        options.update(init_weights=False, aux_logits=True)
    if name.startswith("quantized"):
        options["quantize"] = False
    sizes = {"inception_v3": 299, "quantized_inception_v3": 299, "maxvit_t": 224, "alexnet": 224, "googlenet": 128}
    model = made(**options)
    return Network(model, (images(size or sizes.get(name, 96)),), numbered(model, *patterns))

"""Networks of other people's libraries, each with an input, the stages that its library names, and where its head begins.

A network is named by its library, its name there and options: "timm:resnet18", "timm:vit_base_patch16_224 depth=4",
"smp:Unet encoder=resnet18". Words before " of " wrap it: "lora of timm:vit_tiny_patch16_224". Weights are random, none is
downloaded.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.zoo import monai, open_clip, own, smp, timm, torchvision, transformers, ultralytics
from benchmarks.zoo.network import BATCH, HEADS, Network, numbered
from benchmarks.zoo.wrapped import WRAPPERS

__all__ = ["BATCH", "HEADS", "LIBRARIES", "WRAPPERS", "Network", "build", "numbered"]

# Of each library the function that builds its networks, and the package that it needs.
LIBRARIES: dict[str, tuple[Callable[..., Network], str]] = {
    "timm": (timm.network, "timm"),
    "transformers": (transformers.network, "transformers"),
    "torchvision": (torchvision.network, "torchvision"),
    "smp": (smp.network, "segmentation_models_pytorch"),
    "ultralytics": (ultralytics.network, "ultralytics"),
    "monai": (monai.network, "monai"),
    "open_clip": (open_clip.network, "open_clip"),
    "own": (own.network, "timm"),
}


def build(spec: str) -> Network:
    """The network of that name, in evaluation mode.

    Raises:
        ImportError: its library is not installed.
    """
    *wrappers, spec = spec.split(" of ")
    name, *options = spec.split()
    library, _, name = name.partition(":")
    values = {key: _literal(value) for key, _, value in (option.partition("=") for option in options)}
    builder, needs = LIBRARIES[library]
    for package in [needs] + ["peft"] * ("lora" in wrappers):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed")
    network = builder(name, **values)
    for wrapper in reversed(wrappers):
        network = WRAPPERS[wrapper](network)
    network.model.eval().requires_grad_(True)
    return network


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

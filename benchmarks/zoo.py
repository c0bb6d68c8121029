"""Networks of other people's libraries, each with an input, the stages that its library names, and where its head begins.

A network is named by its library, its name there and options: "timm:resnet18", "timm:vit_base_patch16_224 depth=4",
"smp:Unet encoder=resnet18". None has weights, none is downloaded.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2


@dataclass
class Network:
    """A network to look for taps in.

    Attributes:
        model: the network.
        example: the arguments of its forward pass.
        features: its modules that return the features of a stage, by the library's own names, from shallow to deep, with
            their channels where they are known.
        heads: expression for the paths of modules that are no part of the body.
        sequence: whether values of three axes are (N, C, L).
    """

    model: nn.Module
    example: tuple[Any, ...]
    features: list[tuple[str, int | None]] = field(default_factory=list)
    heads: str = r"(head|heads|fc|classifier|last_linear|decoder|decode_head|segmentation_head|neck|fpn)(_?\w*)?(\.|$)"
    sequence: bool = False


class MissingLibraryError(ImportError):
    """A library of the zoo is not installed."""


def build(spec: str) -> Network:
    """The network of that name, in evaluation mode.

    Raises:
        MissingLibraryError: its library is not installed.
    """
    name, *options = spec.split()
    library, _, name = name.partition(":")
    values = {key: _literal(value) for key, _, value in (option.partition("=") for option in options)}
    builder, needs = LIBRARIES[library]
    if importlib.util.find_spec(needs) is None:
        raise MissingLibraryError(f"{needs} is not installed")
    network = builder(name, **values)
    network.model.eval()
    return network


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def images(size: int, channels: int = 3) -> Tensor:
    """Square images of noise (N, C, H, W)."""
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def children(model: nn.Module, pattern: str) -> list[tuple[str, int | None]]:
    """The modules whose path is the pattern with numbers for its stars, in their order.

    Examples:
        >>> children(nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU()), "*")
        [('0', None), ('1', None)]
    """
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + "$")
    return [(path, None) for path, _ in model.named_modules() if expression.match(path)]


def _timm(name: str, size: int | None = None, **options: Any) -> Network:
    import timm

    model = timm.create_model(name, **{"num_classes": 10, **options})
    configured = (model.pretrained_cfg or {}).get("input_size") or (3, 224, 224)
    size = size or options.get("img_size") or configured[-1]
    features = [(info["module"], info["num_chs"]) for info in getattr(model, "feature_info", None) or []]
    return Network(model, (images(size, configured[0]),), features)


# Of each library the function that builds its networks, and the package that it needs.
LIBRARIES: dict[str, tuple[Callable[..., Network], str]] = {
    "timm": (_timm, "timm"),
}

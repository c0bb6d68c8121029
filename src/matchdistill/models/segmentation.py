"""Networks that give every pixel a class: torchvision's heads over any backbone of timm's.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from matchdistill.messages import did_you_mean
from matchdistill.models.build import SOURCES, build_with, weightless, weights_file
from matchdistill.models.detection import timm_body, timm_strides

ARCHITECTURES = ("deeplabv3", "fcn", "lraspp")
LOW_STRIDE = 8  # of the finer map that LR-ASPP adds


class Encoder(nn.Module):
    """A body, and the names under which a head takes its maps.

    Args:
        body: images (N, 3, H, W) -> maps (N, C, H, W), a list from the finest to the coarsest.
        names: of the maps.
    """

    def __init__(self, body: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.body, self.names = body, tuple(names)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps (N, C, H, W) by name."""
        return dict(zip(self.names, self.body(images), strict=True))


def segmenter(
    num_classes: int,
    architecture: str = "deeplabv3",
    backbone: str = "timm:resnet18",
    backbone_weights: str | None = None,
    output_stride: int = 16,
    atrous_rates: Sequence[int] = (6, 12, 18),
    head_channels: int = 128,
    aux_loss: bool = False,
) -> nn.Module:
    """A network of torchvision's that gives every pixel a class, over any backbone of timm's.

    Args:
        num_classes: number of classes, a background included.
        architecture: "deeplabv3", "fcn" or "lraspp".
        backbone: the name of one of timm's networks with maps, "timm:NAME"; over torchvision's there are networks by name,
            "torchvision:deeplabv3_resnet50".
        backbone_weights: the backbone's weights, as `build_model` takes them; its head may be for any classes.
        output_stride: of the coarsest map, 8, 16 or 32, as far as the backbone can dilate its convolutions for it.
        atrous_rates: of DeepLabV3's head.
        head_channels: width of LR-ASPP's head; the others have torchvision's widths.
        aux_loss: whether "deeplabv3" and "fcn" have a second head, on the map before the last one, to be trained with.

    Raises:
        ValueError: an unknown architecture, a backbone without such maps, or other values that do not fit.

    Examples:
        >>> import torch
        >>> model = segmenter(5, "lraspp", "timm:resnet18", head_channels=16).eval()
        >>> model(torch.zeros(1, 3, 64, 48))["out"].shape
        torch.Size([1, 5, 64, 48])
    """
    _check_choices(architecture, backbone, output_stride)
    # Other strides than 32 are an option that not all of timm's networks have.
    dilated = {} if output_stride == 32 else {"output_stride": output_stride}
    strides = timm_strides(backbone, **dilated)
    wanted = "lraspp" if architecture == "lraspp" else "aux" if aux_loss else "out"
    numbers = _numbers(backbone, strides, wanted)
    names = {"lraspp": ("low", "high"), "aux": ("aux", "out"), "out": ("out",)}[wanted]
    body = timm_body(backbone, backbone_weights, out_indices=numbers, **dilated)
    *others, channels = body.feature_info.channels()  # type: ignore[union-attr, operator]
    encoder = Encoder(body, names)
    if architecture == "lraspp":
        model: nn.Module = segmentation.LRASPP(encoder, others[0], channels, num_classes, head_channels)
        return model
    aux = FCNHead(others[0], num_classes) if aux_loss else None
    deep = architecture == "deeplabv3"
    head = DeepLabHead(channels, num_classes, list(atrous_rates)) if deep else FCNHead(channels, num_classes)
    kind: type[nn.Module] = segmentation.DeepLabV3 if deep else segmentation.FCN
    return kind(encoder, head, aux)


def _check_choices(architecture: str, backbone: str, output_stride: int) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    if not backbone.startswith("timm:"):
        raise ValueError(
            f"backbone {backbone!r}: expected 'timm:NAME'; torchvision's have networks by name, as torchvision:fcn_resnet50"
        )
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride={output_stride}: expected 8, 16 or 32")


def _numbers(backbone: str, strides: Sequence[int], wanted: str) -> list[int]:
    """The numbers of the maps that a head takes."""
    last = len(strides) - 1
    if wanted == "lraspp":
        finer = [number for number, stride in enumerate(strides[:-1]) if stride <= LOW_STRIDE]
        if not finer:
            raise ValueError(
                f"backbone {backbone!r} has maps of the strides {', '.join(map(str, strides))}: lraspp needs one of "
                f"{LOW_STRIDE} or less before the last one"
            )
        return [finer[-1], last]
    if wanted == "aux" and last < 1:
        raise ValueError(f"backbone {backbone!r} has one map only: aux_loss needs two")
    return [last - 1, last] if wanted == "aux" else [last]


def build_segmenter(
    name: str,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    fresh_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network that gives every pixel a class by name, as `build_model` does.

    Args:
        name: "matchdistill.models:segmenter", "torchvision:deeplabv3_resnet50", "smp:Unet", "transformers:segformer" or a
            folder of one or a name of the Hub, or "package.module:function" of your own.
        num_classes: number of classes; None: as the library has it.
        weights: a file, or a name that the library has for its own weights, as `build_model` takes them.
        fresh_head: whether the head is a fresh one where a file is for another number of classes.
        options: further arguments of the function.

    Raises:
        ValueError: an unknown name, weights that do not fit or cannot be had.

    Examples:
        >>> import torch
        >>> model = build_segmenter("torchvision:lraspp_mobilenet_v3_large", 4).eval()
        >>> model(torch.zeros(1, 3, 64, 64))["out"].shape
        torch.Size([1, 4, 64, 64])
    """
    if weights is not None:
        options = weightless(options)
        library, _, entry = name.partition(":")
        # Its weights have a second head, which is then exchanged for other classes too.
        if library == "torchvision" and weights_file(str(weights)) is None and not entry.startswith("lraspp"):
            options = {"aux_loss": True, **options}
    builders = {library: source.pixels or source.build for library, source in SOURCES.items()}
    return build_with(builders, name, num_classes, weights, fresh_head, options)


def backbone_of(model: nn.Module) -> str:
    """The path of the backbone of a network that gives every pixel a class; "": it has none by a usual name."""
    usual = ("backbone", "encoder", getattr(model, "base_model_prefix", None))  # the last one of transformers
    return next((path for path in usual if path and isinstance(getattr(model, path, None), nn.Module)), "")

"""Networks of MONAI, of two or three axes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo.network import BATCH, HEADS, Network, numbered

# Of each network the options that make it small, beside the axes and channels that all take; and its features.
_OWN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "UNet": (
        {"channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2},
        (
            "model.0",
            "model.1.submodule.0",
            "model.1.submodule.1.submodule.0",
            "model.1.submodule.1.submodule.1.submodule",
        ),
    ),
    "AttentionUnet": (
        {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)},
        (
            "model.0",
            "model.1.submodule.0",
            "model.1.submodule.1.submodule.0",
            "model.1.submodule.1.submodule.1.submodule.0",
        ),
    ),
    "BasicUNet": ({"features": (8, 8, 16, 32, 64, 8)}, ("conv_0", "down_#")),
    "SegResNet": ({"init_filters": 8}, ("down_layers.#",)),
    "SegResNetDS": ({"init_filters": 8}, ("encoder.layers.#.blocks",)),
    "DynUNet": (
        {
            "kernel_size": [3] * 4,
            "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2, 2, 2],
            "filters": [8, 16, 32, 64],
        },
        ("input_block", "downsamples.#", "bottleneck"),
    ),
    "VNet": ({}, ("in_tr", "down_tr#")),
    "UNETR": ({"feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}, ("vit.blocks.#",)),
    "SwinUNETR": (
        {"feature_size": 12, "num_heads": (1, 2, 4, 8)},
        ("swinViT.layers#.0.blocks.#", "swinViT.layers4.0.downsample"),
    ),
    "FlexibleUNet": ({"backbone": "resnet18"}, ("encoder.layer#",)),
    "MedNeXt": ({"init_filters": 8}, ("enc_stages.#", "bottleneck")),
    "DenseNet121": ({}, ("features.denseblock#",)),
    "DenseNet169": ({}, ("features.denseblock#",)),
    "SEResNet50": ({}, ("layer#",)),
    "EfficientNetBN": ({"model_name": "efficientnet-b0", "pretrained": False}, ("_blocks.#",)),
    "ViT": (
        {"hidden_size": 48, "mlp_dim": 96, "num_layers": 8, "num_heads": 4, "classification": True},
        ("blocks.#",),
    ),
    "resnet10": ({}, ("layer#",)),
    "resnet18": ({}, ("layer#",)),
    "resnet34": ({}, ("layer#",)),
}


def network(name: str, dims: int = 2, size: int | None = None, channels: int = 1, **options: Any) -> Network:
    from monai.networks import nets

    side = size or (64 if dims == 2 or name == "SwinUNETR" else 32)
    own, patterns = _OWN[name]
    is_resnet = name.startswith("resnet")
    model = getattr(nets.resnet if is_resnet else nets, name)(
        **{"spatial_dims": dims, "n_input_channels" if is_resnet else "in_channels": channels},
        **{**_sized(name, side, dims), **own, **options},
    )
    example = torch.randn(BATCH, channels, *(side,) * dims)
    return Network(
        model, (example,), numbered(model, *patterns), heads=HEADS + r"|(^|\.)(up\w*|out\w*|seg\w*|superv\w*)(\.|$)"
    )


def _sized(name: str, side: int, dims: int) -> dict[str, Any]:
    """The number of classes, and the sizes of images and patches of networks that ask for them."""
    if name == "ViT":
        return {"img_size": (side,) * dims, "patch_size": (16 if dims == 2 else 8,) * dims}
    if name == "UNETR":
        return {"out_channels": 2, "img_size": side}
    by_class = ("resnet10", "resnet18", "resnet34", "SEResNet50", "EfficientNetBN")
    return {"num_classes" if name in by_class else "out_channels": 2}

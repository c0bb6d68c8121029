"""Networks of other people's libraries, each with an input, the stages that its library names, and where its head begins.

A network is named by its library, its name there and options: "timm:resnet18", "timm:vit_base_patch16_224 depth=4",
"smp:Unet encoder=resnet18". Words before " of " wrap it: "lora of timm:vit_tiny_patch16_224". Weights are random, none is
downloaded.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

BATCH = 2
HEADS = r"(^|\.)(heads?|fc|classifier|\w+_classifier|last_linear|decoder|\w+_head|neck|fpn|bbox_\w+|class_\w+)(\.|$)"


@dataclass
class Network:
    """A network to look for taps in.

    Attributes:
        model: the network.
        example: the arguments of its forward pass.
        features: its modules that return the features of a stage, by the library's own names, from shallow to deep, with
            their channels where they are known.
        intermediates: returns these features in their place, where no module of the network does.
        heads: expression for the paths of modules that are no part of the body.
        sequence: whether values of three axes are (N, C, L).
    """

    model: nn.Module
    example: tuple[Any, ...]
    features: list[tuple[str, int | None]] = field(default_factory=list)
    intermediates: Callable[[], list[Tensor]] | None = None
    heads: str = HEADS
    sequence: bool = False


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


def images(size: int, channels: int = 3) -> Tensor:
    """Square images of noise (N, C, H, W)."""
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def numbered(model: nn.Module, *patterns: str) -> list[tuple[str, int | None]]:
    """The modules whose path is one of the patterns, in their order; "#" is a number, "*" a name.

    Examples:
        >>> numbered(nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU()), "#")
        [('0', None), ('1', None)]
    """
    expressions = [
        re.compile(pattern.replace(".", r"\.").replace("#", r"\d+").replace("*", r"\w+")) for pattern in patterns
    ]
    return [(path, None) for path, _ in model.named_modules() if any(each.fullmatch(path) for each in expressions)]


def _timm(name: str, size: int | None = None, **options: Any) -> Network:
    import timm

    configured = timm.get_pretrained_cfg(name)
    channels, *_, own = configured.input_size if configured else (3, 224, 224)
    if size and configured and configured.fixed_input_size:
        options["img_size"] = size
    model = timm.create_model(name, **{"num_classes": 10, **options})
    example = images(size or options.get("img_size", own), options.get("in_chans", channels))
    network = Network(model, (example,))
    infos = getattr(model, "feature_info", None) or []
    network.features = [(info["module"], info["num_chs"]) for info in infos]
    callable_modules = {path for path, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    if name.startswith("hrnet"):  # its names are those of another class
        network.features = numbered(model, "incre_modules.#")
    elif any(path not in callable_modules for path, _ in network.features):
        network.intermediates = _timm_intermediates(network)
    return network


def _timm_intermediates(network: Network) -> Callable[[], list[Tensor]]:
    return lambda: network.model.forward_intermediates(*network.example, intermediates_only=True)  # type: ignore[operator]


# Of transformers' models: the options of a small configuration, the image's size, and the modules that return features.
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 8}
_TRANSFORMERS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "ViTForImageClassification": ({**_SMALL, "image_size": 64}, 64, ("vit.layers.#",)),
    "DeiTForImageClassification": ({**_SMALL, "image_size": 64}, 64, ("deit.layers.#",)),
    "ViTMSNForImageClassification": ({**_SMALL, "image_size": 64}, 64, ("vit.layers.#",)),
    "BeitForImageClassification": ({**_SMALL, "image_size": 64}, 64, ("beit.layers.#",)),
    "Data2VecVisionForImageClassification": ({**_SMALL, "image_size": 64}, 64, ("data2vec_vision.encoder.layer.#",)),
    "Dinov2ForImageClassification": ({**_SMALL, "image_size": 70}, 70, ("*.encoder.layer.#",)),
    "Dinov2WithRegistersForImageClassification": ({**_SMALL, "image_size": 70}, 70, ("*.encoder.layer.#",)),
    "DINOv3ViTBackbone": ({**_SMALL, "image_size": 64}, 64, ("model.layer.#",)),
    "DINOv3ConvNextBackbone": ({"hidden_sizes": [16, 32, 64, 128]}, 64, ("model.stages.#",)),
    "VitDetBackbone": (
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8, "image_size": 64},
        64,
        ("encoder.layer.#",),
    ),
    "SwinForImageClassification": ({"embed_dim": 24}, 224, ("swin.encoder.layers.#.blocks.#",)),
    "Swinv2ForImageClassification": ({"embed_dim": 24}, 224, ("swinv2.encoder.layers.#.blocks.#",)),
    "ConvNextForImageClassification": ({"hidden_sizes": [16, 32, 64, 128]}, 64, ("convnext.encoder.stages.#",)),
    "ConvNextV2ForImageClassification": ({"hidden_sizes": [16, 32, 64, 128]}, 64, ("convnextv2.encoder.stages.#",)),
    "ResNetForImageClassification": (
        {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]},
        64,
        ("resnet.encoder.stages.#",),
    ),
    "RegNetForImageClassification": (
        {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 2, 4, 2], "groups_width": 16},
        64,
        ("regnet.encoder.stages.#",),
    ),
    "PvtForImageClassification": ({"image_size": 64}, 64, ("pvt.encoder.block.#.#",)),
    "PvtV2ForImageClassification": ({"image_size": 64}, 64, ("pvt_v2.encoder.layers.#",)),
    "SegformerForImageClassification": ({}, 64, ("segformer.stages.#",)),
    "MobileViTForImageClassification": ({"image_size": 128}, 128, ("mobilevit.encoder.layer.#",)),
    "MobileViTV2ForImageClassification": ({"image_size": 128}, 128, ("mobilevitv2.encoder.layer.#",)),
    "MobileNetV1ForImageClassification": ({}, 64, ("mobilenet_v1.layer.#",)),
    "MobileNetV2ForImageClassification": ({}, 64, ("mobilenet_v2.layer.#",)),
    "LevitForImageClassification": ({}, 224, ("levit.encoder.stages.#.layers.#",)),
    "HieraForImageClassification": (
        {"embed_dim": 24, "depths": [1, 2, 4, 2]},
        224,
        ("hiera.encoder.stages.#.layers.#",),
    ),
    "FocalNetForImageClassification": ({"embed_dim": 24}, 224, ("focalnet.encoder.stages.#.layers.#",)),
    "EfficientNetForImageClassification": (
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        64,
        ("efficientnet.encoder.blocks.#",),
    ),
    "PoolFormerForImageClassification": ({}, 64, ("poolformer.encoder.block.#.#",)),
    "CvtForImageClassification": ({"depth": [1, 2, 4]}, 64, ("cvt.encoder.stages.#",)),
    "BitForImageClassification": (
        {"embedding_size": 32, "hidden_sizes": [128, 256, 512, 1024], "depths": [1, 1, 2, 1]},
        64,
        ("bit.encoder.stages.#",),
    ),
    "HGNetV2ForImageClassification": ({}, 64, ("encoder.stages.#",)),
    "SwiftFormerForImageClassification": ({}, 224, ("swiftformer.encoder.network.#",)),
    "TextNetForImageClassification": ({}, 128, ("textnet.encoder.stages.#",)),
    "PPLCNetForImageClassification": ({}, 64, ("encoder.blocks.#",)),
}


def _resnet(library: Any, *stages: int, width: int = 16) -> Any:
    """The configuration of a small ResNet that returns these stages."""
    return library.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[2 * width, 4 * width, 8 * width, 16 * width],
        depths=[1, 1, 2, 1],
        out_features=[f"stage{stage}" for stage in stages],
    )


def _swin(library: Any, size: int = 64) -> Any:
    return library.SwinConfig(
        image_size=size,
        embed_dim=24,
        depths=[1, 1, 2, 1],
        window_size=4,
        out_features=[f"stage{stage}" for stage in (1, 2, 3, 4)],
    )


_DETR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 10}
_HEADS = {"neck_hidden_sizes": [16, 32, 64, 64], "fusion_hidden_size": 32}
_DPT = {**_SMALL, "image_size": 64, "backbone_out_indices": [1, 3, 5, 7], **_HEADS}
_MASKS = {
    "num_queries": 10,
    "decoder_layers": 3,
    "encoder_layers": 2,
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
}
_MASKS |= {"encoder_feedforward_dim": 64, "dim_feedforward": 64, "num_attention_heads": 4}

# Of the same library's dense models, whose configurations hold a backbone's: made by a function of the library.
_DENSE: dict[str, tuple[Callable[[Any], dict[str, Any]], int, tuple[str, ...]]] = {
    "SegformerForSemanticSegmentation": (lambda _: {}, 64, ("segformer.stages.#",)),
    "MobileViTForSemanticSegmentation": (lambda _: {"image_size": 128}, 128, ("mobilevit.encoder.layer.#",)),
    "MobileNetV2ForSemanticSegmentation": (lambda _: {}, 64, ("mobilenet_v2.layer.#",)),
    "BeitForSemanticSegmentation": (
        lambda _: {**_SMALL, "image_size": 64, "out_indices": [2, 4, 6, 8]},
        64,
        ("beit.layers.#",),
    ),
    "DPTForDepthEstimation": (lambda _: _DPT, 64, ("dpt.encoder.layer.#",)),
    "DPTForSemanticSegmentation": (lambda _: _DPT, 64, ("dpt.encoder.layer.#",)),
    "DepthAnythingForDepthEstimation": (
        lambda library: {
            "backbone_config": library.Dinov2Config(
                hidden_size=64,
                num_attention_heads=4,
                num_hidden_layers=8,
                image_size=70,
                out_features=["stage2", "stage4", "stage6", "stage8"],
                reshape_hidden_states=False,
            ),
            "reassemble_hidden_size": 64,
            **_HEADS,
        },
        70,
        ("backbone.encoder.layer.#",),
    ),
    "GLPNForDepthEstimation": (lambda _: {}, 64, ("glpn.encoder.block.#.#",)),
    "UperNetForSemanticSegmentation": (
        lambda library: {
            "backbone_config": _resnet(library, 1, 2, 3, 4),
            "hidden_size": 32,
            "auxiliary_in_channels": 128,
        },
        64,
        ("backbone.encoder.stages.#",),
    ),
    "MaskFormerForInstanceSegmentation": (
        lambda library: {
            "backbone_config": _swin(library),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": library.DetrConfig(**_DETR, backbone_config=_resnet(library, 4)),
        },
        64,
        (
            "model.pixel_level_module.encoder.model.encoder.layers.#.blocks.#",
            "model.pixel_level_module.encoder.encoder.layers.#.blocks.#",
        ),
    ),
    "Mask2FormerForUniversalSegmentation": (
        lambda library: {"backbone_config": _swin(library), **_MASKS},
        64,
        (
            "model.pixel_level_module.encoder.*.encoder.layers.#.blocks.#",
            "model.pixel_level_module.encoder.encoder.layers.#.blocks.#",
        ),
    ),
    "DetrForObjectDetection": (
        lambda library: {**_DETR, "use_timm_backbone": False, "backbone_config": _resnet(library, 4)},
        64,
        ("model.backbone.*.encoder.stages.#", "model.backbone.conv_encoder.model.encoder.stages.#"),
    ),
    "ConditionalDetrForObjectDetection": (
        lambda library: {**_DETR, "use_timm_backbone": False, "backbone_config": _resnet(library, 4)},
        64,
        ("model.backbone.*.encoder.stages.#", "model.backbone.conv_encoder.model.encoder.stages.#"),
    ),
    "TableTransformerForObjectDetection": (
        lambda library: {**_DETR, "use_timm_backbone": False, "backbone_config": _resnet(library, 4)},
        64,
        ("model.backbone.*.encoder.stages.#", "model.backbone.conv_encoder.model.encoder.stages.#"),
    ),
    "DeformableDetrForObjectDetection": (
        lambda library: {**_DETR, "use_timm_backbone": False, "backbone_config": _resnet(library, 2, 3, 4)},
        64,
        ("model.backbone.*.encoder.stages.#", "model.backbone.conv_encoder.model.encoder.stages.#"),
    ),
    "RTDetrForObjectDetection": (
        lambda _: {"num_queries": 10, "decoder_layers": 2},
        64,
        ("model.backbone.model.encoder.stages.#",),
    ),
    "RTDetrV2ForObjectDetection": (
        lambda _: {"num_queries": 10, "decoder_layers": 2},
        64,
        ("model.backbone.model.encoder.stages.#",),
    ),
    "DFineForObjectDetection": (
        lambda _: {"num_queries": 10, "decoder_layers": 2},
        64,
        ("model.backbone.model.encoder.stages.#",),
    ),
    "YolosForObjectDetection": (
        lambda _: {**_SMALL, "image_size": [64, 64], "num_detection_tokens": 5, "use_mid_position_embeddings": False},
        64,
        ("vit.encoder.layer.#",),
    ),
    "VideoMAEForVideoClassification": (
        lambda _: {**_SMALL, "image_size": 64, "num_frames": 8},
        64,
        ("videomae.encoder.layer.#",),
    ),
    "TimesformerForVideoClassification": (
        lambda _: {**_SMALL, "image_size": 64, "num_frames": 8},
        64,
        ("timesformer.encoder.layer.#",),
    ),
    "ASTForAudioClassification": (
        lambda _: {**_SMALL, "max_length": 64, "num_mel_bins": 64},
        64,
        ("audio_spectrogram_transformer.layers.#",),
    ),
    "Wav2Vec2ForSequenceClassification": (
        lambda _: {**_SMALL, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        64,
        ("wav2vec2.encoder.layers.#",),
    ),
}
_NOT_IMAGES = {
    "VideoMAEForVideoClassification": (BATCH, 8, 3, 64, 64),
    "TimesformerForVideoClassification": (BATCH, 8, 3, 64, 64),
    "ASTForAudioClassification": (BATCH, 64, 64),
    "Wav2Vec2ForSequenceClassification": (BATCH, 8000),
}


def _transformers(name: str, size: int | None = None, **options: Any) -> Network:
    import transformers

    transformers.logging.set_verbosity_error()
    if name in _DENSE:
        make, own, patterns = _DENSE[name]
        small = make(transformers)
    else:
        small, own, patterns = _TRANSFORMERS[name]
    made = getattr(transformers, name)
    if size and "image_size" in small:
        options["image_size"] = size
    model = made(made.config_class(**{**small, **({"num_labels": 5} if "Backbone" not in name else {}), **options}))
    example = torch.randn(_NOT_IMAGES[name]) if name in _NOT_IMAGES else images(size or own)
    heads = (
        HEADS
        + r"|pixel_level_module\.decoder|transformer_module|^model\.(encoder|decoder|enc_\w+|encoder_input_proj)(\.|$)"
    )
    return Network(model, (example,), numbered(model, *patterns), heads=heads if name in _DENSE else HEADS)


# Of torchvision's models that are no residual or plain convolutional networks: the modules that return features.
def _torchvision(name: str, size: int | None = None, **options: Any) -> Network:
    import torchvision

    models = torchvision.models
    made: Any = models.get_model_builder(name)
    options = {"weights": None, "num_classes": 5, **options}
    patterns = next((found for start, found in _TORCHVISION if re.match(start, name)))
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


_TORCHVISION: list[tuple[str, tuple[str, ...]]] = [
    (r"(fcn|deeplabv3)_resnet", (r"backbone.layer#",)),
    (r"deeplabv3_mobilenet", (r"backbone.#",)),
    (r"lraspp", (r"backbone.#",)),
    (r"ssd300", (r"backbone.features.#", r"backbone.extra.0", r"backbone.extra.1")),  # the others are a pyramid's levels
    (
        r"ssdlite",
        (
            r"backbone.features.0.#",
            r"backbone.features.1.#",
        ),
    ),
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


def _smp(name: str, encoder: str, size: int | None = None, **options: Any) -> Network:
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)(encoder, encoder_weights=None, classes=5, **options)
    network = Network(model, (images(size or (128 if name == "PAN" else 64)),))
    network.intermediates = lambda: [value for value in model.encoder(*network.example)[1:] if value.shape[1]]
    return network


def _ultralytics(name: str, size: int | None = None) -> Network:
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


def _monai(name: str, dims: int = 2, size: int | None = None, channels: int = 1, **options: Any) -> Network:
    from monai.networks import nets

    side = size or (64 if dims == 2 or name == "SwinUNETR" else 32)
    known: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "UNet": (
            {
                "spatial_dims": dims,
                "in_channels": channels,
                "out_channels": 2,
                "channels": (8, 16, 32, 64),
                "strides": (2, 2, 2),
                "num_res_units": 2,
            },
            (
                r"model.0",
                r"model.1.submodule.0",
                r"model.1.submodule.1.submodule.0",
                r"model.1.submodule.1.submodule.1.submodule",
            ),
        ),
        "AttentionUnet": (
            {
                "spatial_dims": dims,
                "in_channels": channels,
                "out_channels": 2,
                "channels": (8, 16, 32, 64),
                "strides": (2, 2, 2),
            },
            (
                r"model.0",
                r"model.1.submodule.0",
                r"model.1.submodule.1.submodule.0",
                r"model.1.submodule.1.submodule.1.submodule.0",
            ),
        ),
        "BasicUNet": (
            {"spatial_dims": dims, "in_channels": channels, "out_channels": 2, "features": (8, 8, 16, 32, 64, 8)},
            (r"conv_0", r"down_#"),
        ),
        "SegResNet": (
            {"spatial_dims": dims, "in_channels": channels, "out_channels": 2, "init_filters": 8},
            (r"down_layers.#",),
        ),
        "SegResNetDS": (
            {"spatial_dims": dims, "in_channels": channels, "out_channels": 2, "init_filters": 8},
            (r"encoder.layers.#.blocks",),
        ),
        "DynUNet": (
            {
                "spatial_dims": dims,
                "in_channels": channels,
                "out_channels": 2,
                "kernel_size": [3] * 4,
                "strides": [1, 2, 2, 2],
                "upsample_kernel_size": [2, 2, 2],
                "filters": [8, 16, 32, 64],
            },
            (r"input_block", r"downsamples.#", r"bottleneck"),
        ),
        "VNet": ({"spatial_dims": dims, "in_channels": channels, "out_channels": 2}, (r"in_tr", r"down_tr#")),
        "UNETR": (
            {
                "spatial_dims": dims,
                "in_channels": channels,
                "out_channels": 2,
                "img_size": side,
                "feature_size": 8,
                "hidden_size": 48,
                "mlp_dim": 96,
                "num_heads": 4,
            },
            (r"vit.blocks.#",),
        ),
        "SwinUNETR": (
            {
                "spatial_dims": dims,
                "in_channels": channels,
                "out_channels": 2,
                "feature_size": 12,
                "num_heads": (1, 2, 4, 8),
            },
            (r"swinViT.layers#.0.blocks.#", r"swinViT.layers4.0.downsample"),
        ),
        "DenseNet121": ({"spatial_dims": dims, "in_channels": channels, "out_channels": 2}, (r"features.denseblock#",)),
        "DenseNet169": ({"spatial_dims": dims, "in_channels": channels, "out_channels": 2}, (r"features.denseblock#",)),
        "SEResNet50": ({"spatial_dims": dims, "in_channels": channels, "num_classes": 2}, (r"layer#",)),
        "EfficientNetBN": (
            {
                "model_name": "efficientnet-b0",
                "pretrained": False,
                "spatial_dims": dims,
                "in_channels": channels,
                "num_classes": 2,
            },
            (r"_blocks.#",),
        ),
        "FlexibleUNet": (
            {"in_channels": channels, "out_channels": 2, "backbone": "resnet18", "spatial_dims": dims},
            (r"encoder.layer#",),
        ),
        "MedNeXt": (
            {"spatial_dims": dims, "in_channels": channels, "out_channels": 2, "init_filters": 8},
            (r"enc_stages.#", r"bottleneck"),
        ),
        "ViT": (
            {
                "in_channels": channels,
                "img_size": (side,) * dims,
                "patch_size": (16 if dims == 2 else 8,) * dims,
                "hidden_size": 48,
                "mlp_dim": 96,
                "num_layers": 8,
                "num_heads": 4,
                "classification": True,
                "spatial_dims": dims,
            },
            (r"blocks.#",),
        ),
        "resnet18": ({"spatial_dims": dims, "n_input_channels": channels, "num_classes": 2}, (r"layer#",)),
        "resnet34": ({"spatial_dims": dims, "n_input_channels": channels, "num_classes": 2}, (r"layer#",)),
        "resnet10": ({"spatial_dims": dims, "n_input_channels": channels, "num_classes": 2}, (r"layer#",)),
    }
    own, patterns = known[name]
    made = getattr(nets.resnet if name.startswith("resnet") else nets, name)
    model = made(**{**own, **options})
    example = torch.randn(BATCH, channels, *(side,) * dims)
    return Network(
        model, (example,), numbered(model, *patterns), heads=HEADS + r"|(^|\.)(up\w*|out\w*|seg\w*|superv\w*)(\.|$)"
    )


def _open_clip(name: str, size: int | None = None, whole: bool = False) -> Network:
    import open_clip

    model = open_clip.create_model(name, pretrained=None, **({"force_image_size": size} if size else {}))
    visual: Any = model.visual
    side = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    patterns = (r"transformer.resblocks.#", r"layer#", r"trunk.(stages|blocks).#")
    if not whole:
        return Network(visual, (images(side),), numbered(visual, *patterns))
    text = open_clip.get_tokenizer(name)(["a cat", "a dog"])
    both = [*(f"visual.{pattern}" for pattern in patterns), r"transformer.resblocks.#"]
    return Network(model, (images(side), text), numbered(model, *both))


def _own(name: str, net: str = "resnet18", size: int | None = None, width: int = 16) -> Network:
    """Networks around one of timm's, as people write them for inputs that are not one batch of images."""
    if name == "sequence":
        return Network(
            _Sequence(width),
            (torch.randn(BATCH, 1, 1024),),
            [(f"stages.{number}", None) for number in range(4)],
            sequence=True,
        )
    import timm

    side = size or 64
    model = {"table": _WithTable, "streams": _Streams, "siamese": _Siamese, "list": _OfList}[name](
        lambda: timm.create_model(net, num_classes=16)
    )
    example: dict[str, tuple[Any, ...]] = {
        "table": (images(side), torch.randn(BATCH, 6)),
        "streams": (images(side), images(side).flip(3)),
        "siamese": (images(side), images(side).flip(3)),
        "list": (list(images(side)),),
    }
    features = [(f"net.{info['module']}", info["num_chs"]) for info in timm.create_model(net).feature_info]
    return Network(model, example[name], features)


class _WithTable(nn.Module):
    """An image and the numbers of a table beside it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net, self.table = make(), nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.classifier = nn.Linear(24, 3)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        joined = torch.cat([self.net(image), self.table(table)], 1)
        return cast("Tensor", self.classifier(joined))


class _Streams(nn.Module):
    """Colours and depths, each with a network of its own."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net, self.depth, self.classifier = make(), make(), nn.Linear(32, 3)

    def forward(self, colours: Tensor, depths: Tensor) -> Tensor:
        return cast("Tensor", self.classifier(torch.cat([self.net(colours), self.depth(depths)], 1)))


class _Siamese(nn.Module):
    """Whether two images show the same."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = make()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(self.net(one), self.net(other))


class _OfList(nn.Module):
    """A list of images, as detectors take them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = make()

    def forward(self, each: list[Tensor]) -> Tensor:
        return cast("Tensor", self.net(torch.stack(each)))


class _Sequence(nn.Module):
    """A residual network of sequences (N, C, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 7, 2, 3), nn.BatchNorm1d(width), nn.ReLU())
        widths = [width * 2**number for number in range(5)]
        self.stages = nn.Sequential(*map(_SequenceBlock, widths[:-1], widths[1:]))
        self.classifier = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.classifier(self.stages(self.stem(x)).mean(2)))


class _SequenceBlock(nn.Module):
    def __init__(self, width: int, after: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(width, after, 3, 2, 1),
            nn.BatchNorm1d(after),
            nn.ReLU(),
            nn.Conv1d(after, after, 3, 1, 1),
            nn.BatchNorm1d(after),
        )
        self.shortcut = nn.Conv1d(width, after, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


# Of each library the function that builds its networks, and the package that it needs.
LIBRARIES: dict[str, tuple[Callable[..., Network], str]] = {
    "timm": (_timm, "timm"),
    "transformers": (_transformers, "transformers"),
    "torchvision": (_torchvision, "torchvision"),
    "smp": (_smp, "segmentation_models_pytorch"),
    "ultralytics": (_ultralytics, "ultralytics"),
    "monai": (_monai, "monai"),
    "open_clip": (_open_clip, "open_clip"),
    "own": (_own, "timm"),
}


def _lora(network: Network) -> Network:
    """Low-rank adapters beside the linear layers of attention and MLPs, or beside convolutions; all weights are trained."""
    import peft

    names = "qkv|query|value|fc1|conv1|q_proj|v_proj"
    network.model = peft.get_peft_model(network.model, peft.LoraConfig(r=4, target_modules=rf".*\.({names})"))
    network.features = [(f"base_model.model.{path}", channels) for path, channels in network.features]
    return network


def _compiled(network: Network) -> Network:
    network.model = torch.compile(network.model, backend="eager")  # type: ignore[assignment]
    network.features = [(f"_orig_mod.{path}", channels) for path, channels in network.features]
    return network


def _parallel(network: Network) -> Network:
    network.model = nn.DataParallel(network.model)
    network.features = [(f"module.{path}", channels) for path, channels in network.features]
    return network


def _bfloat16(network: Network) -> Network:
    network.model.to(torch.bfloat16)
    network.example = tuple(
        value.to(torch.bfloat16) if isinstance(value, Tensor) else value for value in network.example
    )
    return network


WRAPPERS: dict[str, Callable[[Network], Network]] = {
    "lora": _lora,
    "compiled": _compiled,
    "parallel": _parallel,
    "bfloat16": _bfloat16,
}

"""Networks of transformers, in small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.zoo.network import BATCH, HEADS, Network, images, numbered

# Of transformers' models: the options of a small configuration, the image's size, and the modules that return features.
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 8}
_CLASSIFIERS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
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


def network(name: str, size: int | None = None, **options: Any) -> Network:
    import transformers

    transformers.logging.set_verbosity_error()
    if name in _DENSE:
        make, own, patterns = _DENSE[name]
        small = make(transformers)
    else:
        small, own, patterns = _CLASSIFIERS[name]
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

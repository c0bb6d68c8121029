"""Detectors over a backbone with a feature pyramid, in torchvision's API: lists of images in, losses or detections out.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import detection, list_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from matchdistill.messages import cause, did_you_mean, silent
from matchdistill.models.build import build_model, take_head, weightless, weights_file
from matchdistill.models.huggingface_detection import build_transformers_detector
from matchdistill.models.weights import load_weights
from matchdistill.norms import group_norm
from matchdistill.probing import scratch

ARCHITECTURES = {
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
    "faster_rcnn": detection.FasterRCNN,
    "mask_rcnn": detection.MaskRCNN,
}
ONE_STAGE = ("retinanet", "fcos")
STRIDES = (4, 8, 16, 32)  # of C2 to C5
LEVELS = 5  # of the pyramid that the heads see
EXAMPLE_SIZE = 128  # pixels of the images that a backbone is tried on
# What torchvision's detectors, trained on COCO, have learned, by label: the ids of COCO, which have gaps.
COCO_LABELS: list[str] = detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


def detector(
    num_classes: int,
    architecture: str = "retinanet",
    backbone: str = "torchvision:resnet50",
    backbone_weights: str | None = None,
    frozen_stages: int = 0,
    trained_norms: Literal["all", "last", "none"] = "all",
    pyramid_channels: int = 256,
    pyramid_norm: Literal["none", "group"] = "none",
    anchor_size: int = 32,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **options: Any,
) -> nn.Module:
    """A detector of torchvision's over any backbone.

    Args:
        num_classes: number of classes, without the background.
        architecture: "retinanet", "fcos", "faster_rcnn" or "mask_rcnn".
        backbone: the name of a classifier with maps of the strides 4, 8, 16 and 32, as `build_model` takes it.
        backbone_weights: the classifier's weights, as `build_model` takes them; its head may be for any classes.
        frozen_stages: how much of the backbone is not trained: 1 the stem, 2 also C2 (stride 4), ... 5 all of it. The
            paper's students have 1.
        trained_norms: which batch norms of the backbone are trained: "all"; "last", only the last block at each
            stride, the others keep their statistics, scales and shifts, as in the paper; or "none".
        pyramid_channels: width of the feature pyramid, and of the heads on it; of FCOS a multiple of 32.
        pyramid_norm: "group" puts group norms into the pyramid, and into RetinaNet's heads, which then learn faster and take
            higher rates, above all over backbones without an activation at their maps' end; "none" is the papers'.
        anchor_size: pixels of the smallest anchors, which double from level to level (FCOS has none).
        min_size: pixels of an image's shorter side; of several one is drawn for every training image, the last one is used
            elsewhere.
        max_size: pixels that its longer side does not exceed.
        options: further arguments of torchvision's class, for example `detections_per_img`.

    Raises:
        ValueError: an unknown architecture, a backbone without these strides, or other values that do not fit.

    Examples:
        >>> model = detector(4, "retinanet", "torchvision:resnet18", pyramid_channels=32, min_size=64).eval()
        >>> sorted(model([torch.zeros(3, 48, 64)])[0])
        ['boxes', 'labels', 'scores']
    """
    _check_choices(architecture, frozen_stages, trained_norms, pyramid_norm)
    body, channels = _body(backbone, backbone_weights)
    _freeze(body, frozen_stages, trained_norms)
    one_stage = architecture in ONE_STAGE
    extra = LastLevelP6P7(pyramid_channels, pyramid_channels) if one_stage else LastLevelMaxPool()
    norm = group_norm if pyramid_norm == "group" else None
    # The one-stage detectors look at C3 to C5: C2 would give them too many anchors.
    pyramid = Backbone(body, channels[1:] if one_stage else channels, pyramid_channels, extra, norm)
    if architecture != "fcos":
        options |= _anchors(architecture, anchor_size, pyramid_channels, num_classes + 1, norm)
    heads = {} if one_stage else _roi_heads(pyramid_channels, num_classes + 1, architecture == "mask_rcnn")
    model: nn.Module = ARCHITECTURES[architecture](
        pyramid, None if heads else num_classes + 1, min_size=min_size, max_size=max_size, **{**heads, **options}
    )
    return model


def _check_choices(architecture: str, frozen_stages: int, trained_norms: str, pyramid_norm: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    if not 0 <= frozen_stages <= 5:
        raise ValueError(f"frozen_stages={frozen_stages}: expected 0 (none) to 5 (the whole backbone)")
    if trained_norms not in ("all", "last", "none"):
        raise ValueError(f"trained_norms={trained_norms!r}: expected 'all', 'last' or 'none'")
    if pyramid_norm not in ("none", "group"):
        raise ValueError(f"pyramid_norm={pyramid_norm!r}: expected 'none' or 'group'")


def _anchors(
    architecture: str, size: int, width: int, classes: int, norm: Callable[[int], nn.Module] | None
) -> dict[str, nn.Module]:
    """The anchors of a detector, from a size on the finest level, and the head that RetinaNet has with norms."""
    steps = (0, 1 / 3, 2 / 3) if architecture == "retinanet" else (0,)
    sizes = tuple(tuple(int(size * 2**level * 2**step) for step in steps) for level in range(LEVELS))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * LEVELS)
    if architecture != "retinanet":
        return {"rpn_anchor_generator": anchors}
    if norm is None:
        return {"anchor_generator": anchors}
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
    return {"anchor_generator": anchors, "head": head}


def _roi_heads(width: int, classes: int, masks: bool) -> dict[str, nn.Module]:
    """Heads as wide as the pyramid, which those of the one-stage detectors are too; of 256 they are torchvision's own."""
    heads: dict[str, nn.Module] = {
        "box_head": TwoMLPHead(width * 7**2, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes),
    }
    if masks:
        heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        heads["mask_predictor"] = MaskRCNNPredictor(width, width, classes)
    return heads


class Backbone(nn.Module):
    """A body, and a feature pyramid over its last maps.

    Args:
        body: images (N, 3, H, W) -> maps (N, C, H, W), a list or dictionary from the finest to the coarsest.
        channels: widths of the maps that the pyramid takes, the last ones.
        out_channels: its own width.
        extra: makes its further levels.
        norm: of its convolutions, built from the number of channels.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        out_channels: int,
        extra: nn.Module,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, extra, norm)
        self.levels, self.out_channels = len(channels), out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> levels (N, out_channels, H, W) by name, from the finest to the coarsest."""
        levels: dict[str, Tensor] = self.fpn(
            OrderedDict((str(number), level) for number, level in enumerate(_maps(self.body(images))[-self.levels :]))
        )
        return levels


def _maps(output: Any) -> list[Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


def _body(name: str, weights: str | None) -> tuple[nn.Module, list[int]]:
    """What makes C2 to C5 of a classifier, and their widths."""
    if name.startswith("timm:"):
        strides = timm_strides(name)
        _check_strides(name, strides)
        body = timm_body(name, weights, out_indices=[strides.index(stride) for stride in STRIDES])
    else:
        model = build_model(name, None, weights, fresh_head=True)
        whole = getattr(model, "features", model)
        ends = {stride: path for path, stride in _children_strides(model, whole)}
        _check_strides(name, ends)
        body = IntermediateLayerGetter(whole, {ends[stride]: str(stride) for stride in STRIDES})
    try:
        with torch.no_grad(), scratch(body) as probe:
            levels = _maps(probe.eval()(torch.zeros(1, 3, EXAMPLE_SIZE, EXAMPLE_SIZE)))
            shapes = [tuple(level.shape) for level in levels]
    except Exception as error:  # some take one size only
        raise ValueError(f"backbone {name!r} does not take images of {EXAMPLE_SIZE} px: {cause(error)}") from error
    if [EXAMPLE_SIZE // shape[-1] for shape in shapes] != list(STRIDES):
        found = ", ".join(map(str, shapes))
        raise ValueError(f"backbone {name!r} gives {found} for an image of {EXAMPLE_SIZE} px: expected (N, C, H, W)")
    return body, [shape[1] for shape in shapes]


def timm_strides(name: str, **options: Any) -> list[int]:
    """The strides of the maps that one of timm's networks gives as a body."""
    with torch.device("meta"):  # only to look at
        strides: list[int] = build_model(name, features_only=True, **options).feature_info.reduction()  # type: ignore[union-attr, operator]
    return strides


def timm_body(name: str, weights: str | None, **options: Any) -> nn.Module:
    """What makes the maps of one of timm's networks.

    Args:
        name: of the network, with "timm:" in front.
        weights: of the whole network, as `build_model` takes them; its head may be for any classes.
        options: of timm's, such as `out_indices` and `output_stride`.
    """
    file = None if weights is None else weights_file(weights)
    if file is not None:
        # timm loads what fits; this is an error if the file is not the network's.
        build_model(name, None, file, fresh_head=True)
        options["pretrained_cfg_overlay"] = {"file": str(file)}
        weights = "pretrained"
    with silent("timm.models._builder"):  # which would name the parts of the head: they are left out
        return build_model(name, None, weights, features_only=True, **options)


def _check_strides(name: str, strides: Any) -> None:
    if not set(STRIDES) <= set(strides):
        raise ValueError(
            f"backbone {name!r} has maps of the strides {', '.join(map(str, strides))}: a pyramid needs 4, 8, 16 and 32"
        )


def _children_strides(model: nn.Module, whole: nn.Module) -> list[tuple[str, int]]:
    """The children of a part of a model with the strides of their maps, in order."""
    spans = _spans(model)
    return [(name, spans[child][1]) for name, child in whole.named_children() if child in spans]


def _spans(model: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """Of every module the strides of the maps that it takes and gives, in the order in which they are done."""
    spans: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ends = [value for value in (args[0] if args else None, output) if isinstance(value, Tensor) and value.ndim == 4]
        if len(ends) == 2 and min(ends[0].shape[2], ends[1].shape[2]) > 1:
            spans[module] = (EXAMPLE_SIZE // ends[0].shape[2], EXAMPLE_SIZE // ends[1].shape[2])

    with torch.no_grad(), scratch(model) as probe:
        originals = dict(zip(probe.modules(), model.modules(), strict=True))
        handles = [module.register_forward_hook(note) for module in originals]
        try:
            probe.eval()(torch.zeros(1, 3, EXAMPLE_SIZE, EXAMPLE_SIZE))
        finally:
            for handle in handles:
                handle.remove()
    return {originals[module]: strides for module, strides in spans.items()}


def _freeze(body: nn.Module, stages: int, trained_norms: str) -> None:
    """Take the first stages of a body out of training, and the batch norms that are not to be trained."""
    if not stages and trained_norms == "all":
        return
    spans = _spans(body)
    done = list(spans)
    parts = sorted(_parts(body, spans), key=lambda part: done.index(part[0]))
    ends = {_last_block(part) for part in {stage: part for part, stage in parts if stage >= stages}.values()}
    for part, stage in parts:
        if stage < stages:
            part.requires_grad_(False)
    frozen = {part for part, stage in parts if stage < stages}
    _freeze_norms(body, frozen, ends if trained_norms == "last" else set(), trained_norms == "all")


def _last_block(part: nn.Module) -> nn.Module:
    """The last of a stage's blocks; a block by itself, which may be a sequence too, ends in no module with a batch norm."""
    last = list(part.children())[-1] if isinstance(part, nn.Sequential) and len(part) else part
    return last if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in last.modules()) else part


def _parts(module: nn.Module, spans: dict[nn.Module, tuple[int, int]]) -> Iterator[tuple[nn.Module, int]]:
    """The modules that an image goes through in turn, each with its stage: 0 the stem, 1 stride 4, 2 stride 8, ..."""
    for child in module.children():
        if child not in spans:  # a container, or one that is not on the way
            yield from _parts(child, spans)
            continue
        first, last = spans[child]
        if last > 2 * first and not (first == 1 and last <= 4) and any(child.children()):
            yield from _parts(child, spans)
        else:
            yield child, 0 if first == 1 else max(0, last.bit_length() - 2)


def _freeze_norms(module: nn.Module, frozen: set[nn.Module], kept: set[nn.Module], trained: bool) -> None:
    """Replace the batch norms in frozen modules, and elsewhere those outside of the kept ones."""
    from timm.layers.norm_act import freeze_batch_norm_2d

    for name, child in module.named_children():
        trains = child not in frozen and (trained or child in kept)
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if not trains:
                setattr(module, name, freeze_batch_norm_2d(child))  # type: ignore[no-untyped-call]
        else:
            _freeze_norms(child, frozen, kept, trains)


def build_detector(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    fresh_head: bool = False,
    class_names: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Build a detector by name, as `build_model` does.

    Args:
        name: "matchdistill.models:detector", "torchvision:retinanet_resnet50_fpn" (its backbone has no pre-trained weights
            unless `weights_backbone` says so), "transformers:detr" or a folder of one or a name of the Hub, or
            "package.module:function" of your own.
        num_classes: number of classes, without the background.
        weights: a file, or a name that the library has for its own weights, as `build_model` takes them.
        fresh_head: whether the head is a fresh one where a file is for another number of classes.
        class_names: of the classes, the one of label 1 first. If COCO has them all, weights for COCO's 91 labels, as
            torchvision publishes them, are for these: the head keeps what it has learned of them.
        options: further arguments of the function.

    Raises:
        ValueError: an unknown name, weights that do not fit or cannot be had.
    """
    library, _, entry = name.partition(":")
    file = None if weights is None else weights_file(str(weights))
    labels = [COCO_LABELS.index(each) for each in ("__background__", *class_names) if each in COCO_LABELS]
    known = not fresh_head and len(labels) == num_classes + 1
    if weights is not None:
        options = weightless(options)
    if library == "torchvision":
        if entry not in list_models(detection):
            hint = did_you_mean(entry, list_models(detection))
            raise ValueError(f"model {name!r}: torchvision has no such detector{hint}")
        num_classes += 1
        if known and weights is not None and file is None:
            model = build_model(name, None, weights, **options)
            own = build_model(name, num_classes, **options)
            state = own.state_dict()
            own.load_state_dict({**state, **of_labels(model.state_dict(), state, labels)}, strict=False)
            take_head(model, own)
            return model
    if library == "transformers":
        model = build_transformers_detector(
            entry, None if weights is None or file else str(weights), {**options, "num_classes": num_classes}
        )
    else:
        model = build_model(name, num_classes, None if file else weights, **options)
    if file is not None:

        def adapt(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
            state = of_today(state, model)
            return of_labels(state, own, labels) if known else state

        load_weights(model, file, fresh_head=fresh_head, adapt=adapt)
    return model


def of_today(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict under the names that torchvision's detectors have now: the files that it publishes are older."""
    renamed = dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is loaded into a copy without memory
        for path, part in model.named_modules():
            if type(part)._load_from_state_dict.__module__.startswith("torchvision."):
                copied = copy.deepcopy(part).to("meta")
                copied._load_from_state_dict(renamed, f"{path}." if path else "", {}, False, [], [], [])
    return renamed


def of_labels(state: dict[str, Tensor], own: Mapping[str, Tensor], labels: Sequence[int]) -> dict[str, Tensor]:
    """A state dict for COCO's labels as one for some of them.

    Args:
        state: of a detector of torchvision's; where its heads are for others it is returned as it is.
        own: the state dict of the model that it is for.
        labels: which label of COCO each of its labels is, the background included.
    """
    chosen = dict(state)
    for name, rows in state.items():
        fitting = name in own and rows.ndim and len(rows) * len(labels) == len(own[name]) * len(COCO_LABELS)
        if fitting and rows.shape != own[name].shape and len(rows) % len(COCO_LABELS) == 0:
            # Of two stages, a label has its 4 rows of boxes together; of one, an anchor has its rows of all labels.
            by_label = "bbox_pred" in name
            groups = (len(COCO_LABELS), -1) if by_label else (-1, len(COCO_LABELS))
            grouped = rows.reshape(*groups, *rows.shape[1:])
            chosen[name] = grouped.index_select(0 if by_label else 1, torch.tensor(labels)).flatten(0, 1)
    return chosen

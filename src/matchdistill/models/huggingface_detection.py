"""Detectors of Hugging Face transformers by name, DETR and its relatives, in the API of torchvision's detectors.

Axes: N images, H height, W width, n boxes of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from matchdistill.models.huggingface import Kind, build_transformers
from matchdistill.models.huggingface_images import processor_of, processor_values

DETECTOR = Kind("detector", "AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", logits=False)
INPUT = (
    "min_size",
    "max_size",
    "fixed_size",
    "image_mean",
    "image_std",
)  # options of how images are prepared, by torchvision's names
BODIES = ("model.backbone.model", "model.backbone.conv_encoder.model")  # of DETR's relatives, and of DAB-DETR
DIVISOR = 32  # sides of batches are multiples of it, as torchvision's are; the padding is masked


class TransformersDetector(nn.Module):
    """A detector of transformers that takes and gives what torchvision's detectors do.

    In training it returns its own loss, of boxes in shares of each image's size. Elsewhere it returns what its image
    processor makes of the output. Labels begin with 1, as torchvision's do; in the model they begin with 0.

    Args:
        model: the network of transformers.
        transform: how images are resized, normalised and padded.
        processor: its image processor, which turns outputs into boxes.
    """

    def __init__(self, model: nn.Module, transform: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model, self.transform, self.processor = model, transform, processor

    @property
    def stored_network(self) -> nn.Module:
        """What files have the weights of, under the names by which transformers loads them."""
        return self.model

    @property
    def backbone(self) -> nn.Module:
        """What makes maps of images (N, 3, H, W)."""
        found = _body(self.model)
        assert found is not None
        return found

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Images (3, H, W) -> in training a dictionary of losses, else "boxes" (n, 4), "scores" and "labels" of each."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        mask = torch.zeros(len(images), *batch.tensors.shape[-2:], dtype=torch.int64, device=batch.tensors.device)
        for own, (height, width) in zip(mask, batch.image_sizes, strict=True):
            own[:height, :width] = 1
        if self.training:
            assert targets is not None
            labels = [_labels(each, size) for each, size in zip(targets, batch.image_sizes, strict=True)]
            return {"detr": self.model(pixel_values=batch.tensors, pixel_mask=mask, labels=labels).loss}
        output = self.model(pixel_values=batch.tensors, pixel_mask=mask)
        found = self.processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        return [{**each, "labels": each["labels"] + 1} for each in found]


def _body(model: nn.Module) -> nn.Module | None:
    """The backbone of a network of transformers that makes maps; None if it has none."""
    modules = dict(model.named_modules())
    return next((modules[path] for path in BODIES if path in modules), None)


def _labels(target: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Boxes and labels of an image of a size as transformers takes them."""
    height, width = size
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / target["boxes"].new_tensor([width, height, width, height])
    return {"class_labels": target["labels"] - 1, "boxes": boxes}


def build_transformers_detector(entry: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    """A detector in torchvision's API; see `build_transformers`.

    The backbone is trained as a whole. With pretrained weights for other classes the head is a fresh one.

    Args:
        entry: a folder with a ``config.json``, a name of the Hub, or a model type such as "detr".
        pretrained: "pretrained" for the weights of the folder or name; None starts at random.
        options: fields of its config, ``num_classes``, and of how images are prepared ``min_size``, ``max_size``,
            ``fixed_size`` (width, height), ``image_mean`` and ``image_std``, as torchvision's detectors have them; what is
            left out is its processor's. With ``min_size`` or ``max_size`` images keep their ratio; else RT-DETR's become
            squares, as its processor makes them.

    Raises:
        ValueError: in one line, no such model, one without a backbone of maps, or options that do not fit.
    """
    name, options = f"transformers:{entry}", dict(options)
    given = {key: options.pop(key) for key in INPUT if key in options}
    model: Any = build_transformers(entry, pretrained, options, DETECTOR)
    processor = processor_of(entry, model.config)
    body = _body(model)
    if body is None:
        raise ValueError(
            f"model {name!r} has no backbone of maps at {' or '.join(BODIES)}: expected a DETR or one of its relatives over "
            "a backbone, such as detr, deformable_detr or rt_detr"
        )
    body.requires_grad_(True)
    try:
        usual = {**_values(processor, given), **_size(processor, given)}
    except ValueError as error:
        raise ValueError(f"the image processor of {name!r} ({type(processor).__name__}) {error}") from error
    return TransformersDetector(model, GeneralizedRCNNTransform(**{**usual, **given}), processor)


def _values(processor: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What an image processor does to values, in torchvision's words; see `processor_values`."""
    if {"image_mean", "image_std"} <= given.keys():
        return {}
    found = processor_values(processor, do_resize=False)
    if found.reversed:
        raise ValueError(
            "gives images in BGR, which is not converted for detectors: take one for RGB, or, to train it on RGB, give the "
            "options image_mean and image_std"
        )
    return {"image_mean": found.mean, "image_std": found.std}


def _size(processor: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The size that an image processor gives images, in torchvision's words.

    Raises:
        ValueError: in half a sentence, what it does that torchvision has no words for.
    """
    size = {name: side for name, side in dict(processor.size or {}).items() if side is not None}
    square = size.keys() == {"height", "width"}  # whatever the ratio was
    smaller = size.get("shortest_edge") or size.get("height") or 800
    larger = size.get("longest_edge") or size.get("width") or 1333
    usual = {"min_size": smaller, "max_size": larger, "size_divisible": DIVISOR}
    if "fixed_size" in given:
        return {**usual, "size_divisible": 1}
    if {"min_size", "max_size"} & given.keys():
        return usual
    if getattr(processor, "pad_size", None):
        does = "pads images to one size"
    elif not getattr(processor, "do_resize", True):
        does = "leaves images as large as they are"
    elif square:
        return {**usual, "fixed_size": (size["width"], size["height"]), "size_divisible": 1}
    elif size.keys() == {"shortest_edge", "longest_edge"}:
        return usual
    else:
        does = f"resizes images to {size}"
    raise ValueError(f"{does}: say how large they become, by the options min_size and max_size")

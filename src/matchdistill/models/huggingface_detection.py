"""Detectors of Hugging Face transformers by name, DETR and its relatives, in the API of torchvision's detectors.

Axes: N images, H height, W width, n boxes of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from matchdistill.messages import cause
from matchdistill.models.huggingface import Kind, build_transformers, processor_of

DETECTOR = Kind("detector", "AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", logits=False)
INPUT = (
    "min_size",
    "max_size",
    "image_mean",
    "image_std",
)  # options of how images are prepared, by torchvision's names


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
        return self.model.get_submodule("model.backbone.model")

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
            ``image_mean`` and ``image_std``, as torchvision's detectors have them; what is left out is its processor's.

    Raises:
        ValueError: in one line, no such model, one without a backbone of maps, or options that do not fit.
    """
    name, options = f"transformers:{entry}", dict(options)
    given = {key: options.pop(key) for key in INPUT if key in options}
    model: Any = build_transformers(entry, pretrained, options, DETECTOR)
    processor = processor_of(entry, model.config)
    try:
        body = model.get_submodule("model.backbone.model")
    except AttributeError as error:
        raise ValueError(
            f"model {name!r} has no backbone of maps at model.backbone.model ({cause(error)}): expected a DETR or one of "
            "its relatives over a backbone, such as detr, deformable_detr or rt_detr"
        ) from error
    body.requires_grad_(True)
    size, normalises = dict(processor.size), getattr(processor, "do_normalize", True)
    usual = {
        "min_size": size.get("shortest_edge") or size.get("height") or 800,
        "max_size": size.get("longest_edge") or size.get("width") or 1333,
        "image_mean": list(processor.image_mean) if normalises else [0.0] * 3,
        "image_std": list(processor.image_std) if normalises else [1.0] * 3,
    }
    return TransformersDetector(model, GeneralizedRCNNTransform(**{**usual, **given}), processor)

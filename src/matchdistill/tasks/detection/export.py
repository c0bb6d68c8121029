"""The exports of a detector: weights, and ONNX programs for one image.

Axes: n detections of an image, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from matchdistill.models import load_weights, save_weights
from matchdistill.programs import check_onnx, exported_program, open_onnx
from matchdistill.tasks.exporting import Format, write_checked
from matchdistill.trace import tensors_in

DETECTIONS = ("boxes", "scores", "labels", "masks")


def export_detector(model: nn.Module, path: Path, kind: Format, rebuilt: nn.Module) -> float:
    """Write a detector and read it back to see that it detects the same.

    Args:
        model: a list of images (3, H, W) -> a list of detections.
        path: the file to write.
        kind: "safetensors", or "onnx": a program for one image (3, H, W) of any size, float32 in 0..1, that gives
            "boxes" (n, 4), "scores" (n,), "labels" (n,) and "masks" (n, 1, H, W) where there are any. Sizes are rounded
            in 32 bits there: some images are resized to a pixel more or less.
        rebuilt: for "safetensors", the plain model to load the file into.

    Returns:
        The largest absolute difference: of "safetensors" of the backbone's features, boxes and scores; of "onnx" of the
        scores.

    Raises:
        ValueError: another format, a detector that cannot be exported or detects something else then; nothing is left at
            `path` then.
    """
    if kind == "onnx":
        return _export_program(model.eval().cpu(), path)
    if kind != "safetensors":
        raise ValueError(
            f"format {kind!r}: detectors are exported as safetensors or onnx; torch.export takes none of them"
        )
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))]

    def outputs(network: nn.Module) -> Tensor:
        with torch.no_grad():
            (found,) = network.eval().cpu()(images)
            # Of a network that finds nothing yet, these alone.
            levels = tensors_in(network.backbone(network.transform(images)[0].tensors))  # type: ignore[operator]
        return torch.cat([level.flatten() for level in [*levels, found["boxes"], found["scores"]]])

    def read(temporary: Path) -> Tensor:
        load_weights(rebuilt, temporary)
        return outputs(rebuilt)

    return write_checked(path, lambda temporary: save_weights(model, temporary), read, outputs(model))


def _export_program(model: nn.Module, path: Path) -> float:
    check_onnx()
    transform = model.get_submodule("transform")
    side, longest = int(getattr(transform, "min_size", (256,))[-1]), int(getattr(transform, "max_size", 512))
    chance = torch.Generator().manual_seed(0)
    # Of sizes that are not rounded on the way, and all of them are resized otherwise.
    sizes = [(side, min(side * 5 // 4, longest)), (min(side * 3 // 2, longest), side), (side // 2, side // 2)]
    images = [torch.rand(3, *size, generator=chance) for size in sizes]
    with torch.no_grad():
        expected = [model([image])[0] for image in images]  # padding, as in a batch, can change what is found
    names = [name for name in DETECTIONS if name in expected[0]]

    def write(temporary: Path) -> None:
        # The exporter by tracing: that by torch.export does not take torchvision's heads, whose outputs' sizes vary.
        exported_program(
            "torch.onnx",
            lambda: torch.onnx.export(
                OneImage(model, names).eval(),
                (images[0],),
                str(temporary),
                dynamo=False,
                input_names=["image"],
                output_names=names,
                dynamic_axes={"image": [1, 2], **{name: [0] for name in names}},
            ),
        )

    def run(temporary: Path) -> Tensor:
        program = load_detector(temporary)
        return torch.tensor([_difference(program(image), own) for image, own in zip(images, expected, strict=True)])

    return write_checked(path, write, run, torch.zeros(len(images)))


class OneImage(nn.Module):
    """A detector of one image, whose detections come as a tuple of tensors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) -> the detections' tensors."""
        (found,) = self.model([image])
        return tuple(found[name] for name in self.names)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How much two lists of detections differ in scores, infinite where they differ in more.

    Where scores are equal their order, and which of the last are left out, is a matter of rounding.
    """
    if len(found["scores"]) != len(expected["scores"]):
        return math.inf
    if not len(expected["scores"]):
        return 0.0
    difference = (found["scores"].sort().values - expected["scores"].sort().values).abs().max().item()
    for image, other in ((found, expected), (expected, found)):
        decisive = image["scores"] > image["scores"].min() + 1e-4
        near = (image["boxes"][:, None] - other["boxes"]).abs().amax(2) < 0.1  # pixels
        near &= (image["scores"][:, None] - other["scores"]).abs() < 1e-3
        near &= image["labels"][:, None] == other["labels"]
        if "masks" in image:
            near &= (image["masks"][:, None] - other["masks"]).abs().mean((2, 3, 4)) < 1e-2
        if not near.any(1)[decisive].all():
            return math.inf
    return difference


def load_detector(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """What an exported detector (.onnx) finds in an image (3, H, W), on the CPU.

    Raises:
        ValueError: a package that is missing, or no exported detector.
    """
    session = open_onnx(path)
    names = [output.name for output in session.get_outputs()]
    if [given.name for given in session.get_inputs()] != ["image"] or not {*names} <= {*DETECTIONS}:
        raise ValueError(f"{path}: not an exported detector: it gives {', '.join(names)}")
    return lambda image: dict(
        zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True)
    )


class ExportedDetector(nn.Module):
    """An exported program as a student: on the CPU and in its own precision, whatever the trainer's.

    Args:
        path: the file, .onnx.

    Raises:
        ValueError: a package that is missing, or no exported detector.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.suffix.lower() != ".onnx":
            raise ValueError(f"{path}: detectors are measured from weights (.safetensors, .ckpt) or .onnx")
        self.find = load_detector(path)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Images (3, H, W) -> detections."""
        found = [(image.device, self.find(image.float().cpu())) for image in images]
        return [{name: value.to(device) for name, value in own.items()} for device, own in found]

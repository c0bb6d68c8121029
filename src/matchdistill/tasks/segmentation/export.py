"""The exports of a network that gives every pixel a class: weights, and ONNX programs for images of any size.

Axes: N batch, C classes, H height, W width; h, w of a program's map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from matchdistill.models import load_weights, save_weights
from matchdistill.programs import check_onnx, exported_program, open_onnx
from matchdistill.tasks.exporting import Format, add_metadata, write_checked
from matchdistill.tasks.segmentation.outputs import Outputs, divisor_of, outputs_in, segment

Resize = Literal["inside", "outside"]
SIZES = ((2, 64, 96), (1, 96, 64), (3, 80, 72))  # N, H, W of what a program is checked on; the first is traced


def export_segmenter(
    model: nn.Module,
    rebuilt: nn.Module,
    path: Path,
    kind: Format,
    resize: Resize = "inside",
    words: Mapping[str, Any] | None = None,
) -> float:
    """Write a network and read it back to see that it computes the same.

    Args:
        model: the student.
        rebuilt: the plain model to load weights into.
        path: the file to write.
        kind: "safetensors", or "onnx": a program for images (N, 3, H, W) of any number and size that gives "logits".
        resize: where the logits of the program's last map are resized to the images: "inside" the program, which gives
            (N, C, H, W), or "outside": it gives that map (N, C, h, w), and whoever runs it resizes.
        words: how images are prepared: the program's metadata, each value as JSON.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        ValueError: a network that cannot be exported or computes something else then; nothing is left at `path` then.
    """
    model = model.eval().cpu()
    chance = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, *size, generator=chance) for count, *size in SIZES]

    def logits(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([segment(network, images).logits.flatten() for images in batches])

    if kind == "safetensors":

        def loaded(temporary: Path) -> Tensor:
            load_weights(rebuilt, temporary)
            return logits(rebuilt.eval().cpu())

        return write_checked(path, lambda temporary: save_weights(model, temporary), loaded, logits(model))
    check_onnx()
    program = Whole(model) if resize == "inside" else Coarse(model)

    def write(temporary: Path) -> None:
        # The exporter by tracing: with that by torch.export, heights and widths that are resized to must be constants.
        exported_program(
            "torch.onnx",
            lambda: torch.onnx.export(
                program.eval(),
                (batches[0],),
                str(temporary),
                dynamo=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": [0, 2, 3], "logits": [0, 2, 3]},
            ),
        )
        add_metadata(temporary, words or {})

    return write_checked(path, write, lambda temporary: logits(ExportedSegmenter(temporary)), logits(model))


class Whole(nn.Module):
    """A network that gives the logits (N, C, H, W) of every pixel, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits."""
        return segment(self.model, images).logits


class Coarse(nn.Module):
    """A network without its last interpolation, which gives the logits (N, C, h, w) of its own map.

    Raises:
        ValueError: it takes certain sizes only: padding, which is inside of it, would have to be cut off the map.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if (divisor := divisor_of(model)) > 1:
            raise ValueError(
                f"--resize outside: {type(model).__name__} takes heights and widths that are multiples of {divisor}, for "
                "which images are padded: export it with the resize inside"
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of the map."""
        with Interpolations() as seen:
            logits = outputs_in(self.model(images)).logits
        return next((coarse for coarse, resized in seen.ends if resized is logits), logits)


class Interpolations(TorchFunctionMode):
    """The inputs and outputs of all interpolations in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.interpolate:
            self.ends.append((args[0] if args else kwargs["input"], output))
        return output


class ExportedSegmenter(nn.Module):
    """An exported program as a student: on the CPU and in its own precision, whatever the trainer's.

    Args:
        path: the file, .onnx.

    Raises:
        ValueError: a package that is missing, or no exported program of a segmenter.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.suffix.lower() != ".onnx":
            raise ValueError(f"{path}: students of this task are measured from weights (.safetensors, .ckpt) or .onnx")
        self.session = open_onnx(path)
        ends = [end.name for end in (*self.session.get_inputs(), *self.session.get_outputs())]
        if ends != ["images", "logits"]:
            raise ValueError(f"{path}: not an exported segmenter: it takes and gives {', '.join(ends)}")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C, H, W)."""
        (found,) = self.session.run(None, {"images": images.float().cpu().numpy()})
        size = (images.shape[-2], images.shape[-1])
        return Outputs(torch.from_numpy(found)).resized(size).logits.to(images.device)

"""The exports of a classifier: weights, ONNX and torch.export programs.

Axes: N batch, H height, W width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from matchdistill.messages import cause
from matchdistill.models import load_weights, save_weights
from matchdistill.programs import check_onnx, exported_program, open_onnx
from matchdistill.tasks.exporting import Format, write_checked


def export_classifier(
    model: nn.Module,
    images: Tensor,
    path: Path,
    kind: Format,
    rebuilt: nn.Module | None = None,
    words: Mapping[str, Any] | None = None,
    output: str = "logits",
) -> float:
    """Write a model and read it back to see that it computes the same.

    Args:
        model: the student, images (N, 3, H, W) -> logits.
        images: an example (N, 3, H, W) with N of at least 2; N stays free in the exported graph.
        path: the file to write.
        kind: "safetensors" (a state dict), "onnx", or "pt2" (`torch.export`).
        rebuilt: for "safetensors", the plain model to load the file into.
        words: for "onnx", how images are prepared, in timm's words: the file's metadata, each value as JSON.
        output: for "onnx", what its output is called.

    Returns:
        The largest absolute difference of the outputs.

    Raises:
        ValueError: an unknown format, a package that is missing, a model that cannot be exported, or an exported one that
            computes something else; nothing is left at `path` then.
    """
    if kind not in get_args(Format):
        raise ValueError(f"unknown format {kind!r}: expected one of {', '.join(get_args(Format))}")
    model = model.eval().cpu()
    write, run = {
        "safetensors": lambda: _safetensors(model, images, rebuilt),
        "onnx": lambda: _onnx(model, images, words or {}, output),
        "pt2": lambda: _pt2(model, images),
    }[kind]()
    with torch.no_grad():
        # Another batch size than the example's: it must not have been fixed.
        checked = torch.cat([images, torch.randn(3, *images.shape[1:], generator=torch.Generator().manual_seed(0))])
        expected = model(checked)
    return write_checked(path, write, lambda temporary: run(temporary, checked), expected)


_Writer = tuple[Callable[[Path], object], Callable[[Path, Tensor], Tensor]]


def _safetensors(model: nn.Module, images: Tensor, rebuilt: nn.Module | None) -> _Writer:
    assert rebuilt is not None

    def run(path: Path, batch: Tensor) -> Tensor:
        load_weights(rebuilt, path)
        return torch.as_tensor(rebuilt.eval()(batch))

    return lambda path: save_weights(model, path), run


def _pt2(model: nn.Module, images: Tensor) -> _Writer:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = exported_program("torch.export", lambda: torch.export.export(model, (images,), dynamic_shapes=dynamic))
    return lambda path: torch.export.save(program, path), lambda path, batch: read_program(path, "pt2")(batch)


def _onnx(model: nn.Module, images: Tensor, words: Mapping[str, Any], output: str) -> _Writer:
    check_onnx()
    program = exported_program(
        "torch.onnx",
        lambda: torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        ),
    )
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in words.items()})
    return (
        lambda path: program.save(str(path), external_data=False),
        lambda path, batch: read_program(path, "onnx")(batch),
    )


def read_program(path: Path, kind: Literal["onnx", "pt2"]) -> Callable[[Tensor], Tensor]:
    """What an exported file computes, images (N, 3, H, W) -> logits, on the CPU.

    "pt2" files are read by `torch.export`, which can run code that is in them: only those of your own.

    Raises:
        ValueError: a package that is missing, or no exported file.
    """
    if kind == "onnx":
        session = open_onnx(path)
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    try:
        program = torch.export.load(path).module()
        return lambda images: torch.as_tensor(program(images))
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error


class ExportedClassifier(nn.Module):
    """An exported program as a student: on the CPU and in its own precision, whatever the trainer's.

    Args:
        path: the file, .onnx or .pt2.

    Raises:
        ValueError: a package that is missing, or no exported file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = read_program(path, "onnx" if path.suffix.lower() == ".onnx" else "pt2")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits."""
        with torch.autocast("cpu", enabled=False):
            return self.run(images.float().cpu()).to(images.device)

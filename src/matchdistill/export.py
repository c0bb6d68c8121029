"""The student alone, in the formats that it is deployed in, each checked against the model.

Axes: N batch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from matchdistill.files import atomic_write
from matchdistill.messages import cause
from matchdistill.models import load_weights, save_weights
from matchdistill.trace import tensors_in

Format = Literal["safetensors", "onnx", "pt2"]
_Program = TypeVar("_Program")


def export(model: nn.Module, images: Tensor, path: Path, kind: Format, rebuilt: nn.Module | None = None) -> float:
    """Write a model and read it back to see that it computes the same.

    Args:
        model: the student, images (N, 3, H, W) -> logits.
        images: an example (N, 3, H, W) with N of at least 2; N stays free in the exported graph.
        path: the file to write.
        kind: "safetensors" (a state dict), "onnx", or "pt2" (`torch.export`).
        rebuilt: for "safetensors", the plain model to load the file into.

    Returns:
        The largest absolute difference of the outputs.

    Raises:
        ValueError: an unknown format, a package that is missing, a model that cannot be exported, or an exported one that
            computes something else; nothing is left at `path` then.
    """
    if kind not in get_args(Format):
        raise ValueError(f"unknown format {kind!r}: expected one of {', '.join(get_args(Format))}")
    model = model.eval().cpu()
    write, run = {"safetensors": _safetensors, "onnx": _onnx, "pt2": _pt2}[kind](model, images, rebuilt)
    with torch.no_grad():
        # Another batch size than the example's: it must not have been fixed.
        checked = torch.cat([images, torch.randn(3, *images.shape[1:], generator=torch.Generator().manual_seed(0))])
        expected = model(checked)
    return _write_checked(path, write, lambda temporary: run(temporary, checked), expected)


def export_detector(model: nn.Module, path: Path, kind: Format, rebuilt: nn.Module) -> float:
    """Write a detector's weights and read them back to see that it detects the same.

    Args:
        model: a list of images (3, H, W) -> a list of detections.
        path: the file to write.
        kind: "safetensors"; the exporters of programs do not take torchvision's detectors.
        rebuilt: the plain model to load the file into.

    Returns:
        The largest absolute difference of the backbone's features, boxes and scores.

    Raises:
        ValueError: another format, or weights that do not fit the rebuilt model; nothing is left at `path` then.
    """
    if kind != "safetensors":
        raise ValueError(f"format {kind!r}: detectors are exported as safetensors, as their boxes depend on values")
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

    return _write_checked(path, lambda temporary: save_weights(model, temporary), read, outputs(model))


def _write_checked(
    path: Path, write: Callable[[Path], object], run: Callable[[Path], Tensor], expected: Tensor
) -> float:
    """Write a file and see that what is in it computes what is expected; returns the largest difference."""
    difference = 0.0

    def write_and_check(temporary: Path) -> None:
        nonlocal difference
        write(temporary)
        try:
            with torch.no_grad():
                difference = (run(temporary) - expected).abs().max().item()
        except Exception as error:  # whatever the runtime makes of, say, another number of images
            raise ValueError(f"the exported model does not run ({cause(error)}): {path} was not written") from error
        if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the exported model's outputs differ by {difference:.2g}: {path} was not written")

    atomic_write(path, write_and_check)
    return difference


def _traced(exporter: str, trace: Callable[[], _Program]) -> _Program:
    """What the exporter makes of a model, or one line about why it makes nothing of it."""
    try:
        # An exporter that fails prints the graph so far.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return trace()
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ValueError(f"{exporter} cannot take the model ({cause(root)})") from error


_Writer = tuple[Callable[[Path], object], Callable[[Path, Tensor], Tensor]]


def _safetensors(model: nn.Module, images: Tensor, rebuilt: nn.Module | None) -> _Writer:
    assert rebuilt is not None

    def run(path: Path, batch: Tensor) -> Tensor:
        load_weights(rebuilt, path)
        return torch.as_tensor(rebuilt.eval()(batch))

    return lambda path: save_weights(model, path), run


def _pt2(model: nn.Module, images: Tensor, _: nn.Module | None) -> _Writer:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = _traced("torch.export", lambda: torch.export.export(model, (images,), dynamic_shapes=dynamic))
    return lambda path: torch.export.save(program, path), lambda path, batch: load_exported(path, "pt2")(batch)


def _onnx(model: nn.Module, images: Tensor, _: nn.Module | None) -> _Writer:
    try:
        import onnxruntime  # noqa: F401  (to check the file)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise _missing(error) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = _traced(
        "torch.onnx",
        lambda: torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        ),
    )
    assert program is not None
    return (
        lambda path: program.save(str(path), external_data=False),
        lambda path, batch: load_exported(path, "onnx")(batch),
    )


def load_exported(path: Path, kind: Literal["onnx", "pt2"]) -> Callable[[Tensor], Tensor]:
    """What an exported file computes, images (N, 3, H, W) -> logits, on the CPU.

    "pt2" files are read by `torch.export`, which can run code that is in them: only those of your own.

    Raises:
        ValueError: a package that is missing, or no exported file.
    """
    try:
        if kind == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        logging.getLogger("torch.export").setLevel(logging.ERROR)
        program = torch.export.load(path).module()
        return lambda images: torch.as_tensor(program(images))
    except ImportError as error:
        raise _missing(error) from error
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error


def _missing(error: ImportError) -> ValueError:
    return ValueError(f"ONNX needs {error.name}: pip install 'matchdistill[onnx]'")

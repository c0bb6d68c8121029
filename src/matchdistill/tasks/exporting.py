"""What the exports of all tasks share: files that are read back and compared with the network."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from matchdistill.files import atomic_write
from matchdistill.messages import cause
from matchdistill.models import load_weights, save_weights

Format = Literal["safetensors", "onnx", "pt2"]
_Program = TypeVar("_Program")


def export_weights(student: nn.Module, rebuilt: nn.Module, path: Path) -> float:
    """Write a student's weights, and see that another network of its kind has the same when they are loaded.

    Returns:
        The largest absolute difference of the weights, which is 0.

    Raises:
        ValueError: they are not the same; nothing is left at the path.
    """

    def read(temporary: Path) -> Tensor:
        load_weights(rebuilt, temporary)
        return _flat(rebuilt)

    return write_checked(path, lambda temporary: save_weights(student, temporary), read, _flat(student))


def _flat(network: nn.Module) -> Tensor:
    values = [value.detach().cpu().flatten().double() for value in network.state_dict().values()]
    return torch.cat([torch.zeros(1), *values])


def write_checked(
    path: Path, write: Callable[[Path], object], run: Callable[[Path], Tensor], expected: Tensor
) -> float:
    """Write a file and see that what is in it computes what is expected.

    Returns:
        The largest difference, as a share of the largest expected value where that is above 1.
    """
    difference = 0.0

    def write_and_check(temporary: Path) -> None:
        nonlocal difference
        write(temporary)
        try:
            with torch.no_grad():
                difference = (run(temporary) - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        except Exception as error:  # whatever the runtime makes of, say, another number of images
            raise ValueError(f"the exported model does not run ({cause(error)}): {path} was not written") from error
        if not difference <= 1e-3:
            raise ValueError(
                f"the exported model's outputs differ by {difference:.2g} (relative, where outputs are above 1): {path} was "
                "not written"
            )

    atomic_write(path, write_and_check)
    return difference


def exported_program(exporter: str, trace: Callable[[], _Program]) -> _Program:
    """What the exporter makes of a model, or one line about why it makes nothing of it."""
    try:
        said = io.StringIO()  # an exporter that fails prints the graph so far
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            return trace()
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ValueError(f"{exporter} cannot take the model ({cause(root)})") from error


def check_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401  (to check the file)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise missing(error) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def open_onnx(path: Path) -> Any:
    """A session of an ONNX file, on the CPU.

    Raises:
        ValueError: a package that is missing, or no exported program.
    """
    try:
        import onnxruntime

        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise missing(error) from error
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error


def add_metadata(path: Path, values: Mapping[str, Any]) -> None:
    """Add values to an ONNX file's metadata, each as JSON."""
    import onnx

    model = onnx.load(str(path))
    for name, value in values.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, str(path))


def missing(error: ImportError) -> ValueError:
    return ValueError(f"ONNX needs {error.name}: pip install 'matchdistill[onnx]'")

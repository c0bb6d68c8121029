"""What the exports of all tasks share: files that are read back and compared with the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matchdistill.files import atomic_write
from matchdistill.messages import cause
from matchdistill.models import load_weights, save_weights

Format = Literal["safetensors", "onnx", "pt2"]


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


def add_metadata(path: Path, values: Mapping[str, Any]) -> None:
    """Add values to an ONNX file's metadata, each as JSON."""
    import onnx

    model = onnx.load(str(path))
    for name, value in values.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, str(path))

"""Programs that are made from networks, and what reads them: torch.export and ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from matchdistill.messages import cause

_Program = TypeVar("_Program")


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
    """Raise a ValueError unless the packages of ONNX are there."""
    try:
        import onnxruntime  # noqa: F401  (to run the program)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise _missing(error) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def open_onnx(path: Path, threads: int | None = None) -> Any:
    """A session of an ONNX file, on the CPU.

    Args:
        path: the file.
        threads: how many it runs on, which wait without spinning between its runs; None: one for each core.

    Raises:
        ValueError: a package that is missing, or no exported program.
    """
    try:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        if threads is not None:
            settings.intra_op_num_threads = threads
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise _missing(error) from error
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error


def _missing(error: ImportError) -> ValueError:
    return ValueError(f"ONNX needs {error.name}: pip install 'matchdistill[onnx]'")

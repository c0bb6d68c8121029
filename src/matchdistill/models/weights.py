"""Weights from files: nothing in a file is ever executed, and what does not fit is said before anything is loaded."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from matchdistill.files import atomic_write, path_of
from matchdistill.messages import cause

NESTS = ("state_dict", "model_state_dict", "model", "student")
LISTED = 8  # differences that an error names one by one


def load_weights(
    module: nn.Module,
    path: str | Path,
    strict: bool = True,
    fresh_head: bool = False,
    adapt: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> list[str]:
    """Load a state dict from a file into ``module``.

    ``.safetensors`` files and everything that ``torch.save`` wrote are read, the latter without executing what they
    hold. Training checkpoints are unwrapped: ``state_dict`` and similar entries, the student of a distillation, the
    prefixes that DataParallel and ``torch.compile`` leave on names.

    Args:
        module: the network to load into.
        path: the file.
        strict: whether everything must fit. If it does not, nothing is loaded.
        fresh_head: whether the file may be for another number of classes all the same; the module keeps its own head then.
        adapt: what makes the state dict to load from the file's and the module's.

    Returns:
        What was not loaded, one line for each entry; empty if everything fits.

    Raises:
        ValueError: the file cannot be read as weights or, if strict, does not fit.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "linear.pt")
        >>> torch.save(nn.Linear(4, 2).state_dict(), path)
        >>> load_weights(nn.Linear(4, 3), path, strict=False)
        ['weight is (2, 4) in the file, (3, 4) in the model', 'bias is (2,) in the file, (3,) in the model']
    """
    path = path_of(path)
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    state = _unwrap(_read(path), own, path)
    if adapt is not None:
        state = adapt(state, own)
    # Files from before batch norm counted its batches lack the count; PyTorch itself accepts them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    differences = [
        *(f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in reshaped),
        *(f"{key} {tuple(own[key].shape)} is missing" for key in missing),
        *(f"{key} {tuple(state[key].shape)} is unexpected" for key in unexpected),
    ]
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    shapes = [(state[key].shape, own[key].shape) for key in reshaped]
    of_classes = not missing and not unexpected and _differ_by_classes(shapes)
    if strict and differences and of_classes and not fresh_head:
        counts = {(file[0], own[0]) for file, own in shapes}
        single = len(counts) == 1 and all(len(own) <= 2 for _, own in shapes)  # no convolution, for each anchor
        found, wanted = counts.pop()
        raise ValueError(
            f"{path}: these weights are for {found if single else 'other'} classes, the model has "
            f"{wanted if single else 'its own'} ({differences[0]}): build the model with "
            f"{f'num_classes={found}' if single else 'their number'}, or keep its own, untrained head by fresh_head=True"
        )
    if strict and differences and not of_classes:
        listed = "; ".join(differences[:LISTED])
        more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        other = "; this looks like another architecture" if 2 * len(fitting) < len(own) else ""
        raise ValueError(
            f"{path} does not fit {type(module).__name__}, {len(differences)} entries differ: {listed}{more}{other}"
        )
    module.load_state_dict(fitting, strict=False)
    return differences


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors, whole or not at all.

    Raises:
        OSError: the file cannot be written, for example as the disk is full.
    """
    from safetensors.torch import save

    # Copies: the format takes no tensors that share memory, as tied weights do.
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    content = save(weights)  # as bytes: the library would make a file that only its owner can read
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _differ_by_classes(shapes: list[tuple[Size, Size]]) -> bool:
    """Whether the shapes (file, model) differ by the number of classes alone.

    A detector's heads have a row for each class, or several: one for each anchor, or for each side of a box.
    """
    if any(len(file) == 0 or len(own) == 0 or file[1:] != own[1:] for file, own in shapes):
        return False
    return all(file[0] * shapes[0][1][0] == own[0] * shapes[0][0][0] for file, own in shapes)


def no_file(path: Path) -> str:
    """What is said of a path where a file of weights is expected and is not."""
    return "a folder, not a weights file" if path.is_dir() else "there is no such file"


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: {no_file(path)}")
    if path.suffix.lower() != ".safetensors":
        return read_pickle(path, "weights file")
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not a weights file, or a damaged or truncated one ({cause(error)})") from error


def read_pickle(path: Path, kind: str, map_location: Any = "cpu") -> Any:
    """The plain values and tensors of a file that ``torch.save`` wrote; nothing in it is executed.

    Args:
        path: the file.
        kind: what it should be, for the errors.
        map_location: as in ``torch.load``.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles, before the error that matters
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # readers of damaged files fail in every way
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) or re.search("weights[ _]only", text, re.IGNORECASE):
            # Not in PyTorch's words: they recommend to load the file all the same.
            needs = re.search(r"GLOBAL ([\w.]{1,200})", text)
            holds = (
                f"it holds Python objects or code ({needs[1]})" if needs else "it seems to hold Python objects or code"
            )
            raise ValueError(
                f"{path} is refused: not a {kind} of tensors and plain values alone; {holds}, which are not loaded"
            ) from error
        raise ValueError(f"{path}: not a {kind}, or a damaged or truncated one ({cause(error)})") from error


def _unwrap(content: Any, own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    named = content.items() if isinstance(content, Mapping) else ()
    state = {str(key): value for key, value in named if isinstance(value, Tensor)}
    if not state:
        found = f"entries {', '.join(str(key) for key, _ in named)[:200]}" if named else type(content).__name__
        raise ValueError(f"{path} holds no state dict: expected names with tensors, found {found}")
    # Wrappers leave their names on those of the tensors; a name that the model itself has is none of theirs.
    if not any(_inside("_orig_mod", key) for key in own):
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if not any(_inside("student", key) for key in own):
        student = {_inside("student", key): value for key, value in state.items() if _inside("student", key)}
        state = student or state
    for prefix in ("module.", "model."):
        while all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _inside(name: str, key: str) -> str:
    """What follows the component ``name`` in a dotted key; empty if it has no such component."""
    match = re.search(rf"(?:^|\.){name}\.(.+)", key)
    return match[1] if match else ""

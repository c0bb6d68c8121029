"""Weights from files: nothing in a file is ever executed, and what does not fit is said before anything is loaded."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from matchdistill.files import atomic_write, path_of
from matchdistill.messages import cause
from matchdistill.models.skipping import SKIPPING, Code, Skipped

LISTED = 8  # differences that an error names one by one
DEEPEST = 8  # mappings inside of each other that are searched for weights
NESTS = ("state_dict", "model_state_dict", "model", "student", "module")  # where checkpoints usually have them
# Names of copies that follow the weights: taken only where there are no others.
FOLLOWERS = re.compile(r"(^|[._])(ema|averaged|shadow|momentum|teacher|target|swa|encoder_k|queue)(?=[._]|$)")
# Components that wrappers leave inside of names: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
STUDENTS = ("best.safetensors", "student.safetensors")  # in the folder of a finished run, where the second always is
SAVE_ALONE = "load it where it was made, and save the weights alone: torch.save(model.state_dict(), 'weights.pt')"


def load_weights(
    module: nn.Module,
    path: str | Path,
    strict: bool = True,
    fresh_head: bool = False,
    adapt: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> list[str]:
    """Load a state dict from a file into ``module``.

    ``.safetensors`` files and everything that ``torch.save`` wrote are read, the latter without executing what they
    hold: objects of other classes beside the weights, such as arguments, paths and dates, are skipped. The weights of a
    training checkpoint are found by their names: those under the one prefix under which the names of the model are, be it
    of the entries around them (``state_dict``, ``model``), of wrappers (``module.``, ``_orig_mod.``) or of a network that
    has the model as a part. Of several the student's are taken, and copies such as moving averages only where there is
    nothing else.

    Args:
        module: the network to load into.
        path: the file.
        strict: whether everything must fit. If it does not, nothing is loaded.
        fresh_head: whether the file may be for another number of classes all the same; the module keeps its own head then.
        adapt: what makes the state dict to load from the file's and the module's.

    Returns:
        What was not loaded, one line for each entry; empty if everything fits.

    Raises:
        ValueError: the file cannot be read as weights; holds numbers that are not finite, or of a type that weights do not
            have; or, if strict, does not fit.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "linear.pt")
        >>> torch.save(nn.Linear(4, 2).state_dict(), path)
        >>> load_weights(nn.Linear(4, 3), path, strict=False)
        ['weight is (2, 4) in the file, (3, 4) in the model', 'bias is (2,) in the file, (3,) in the model']
    """
    path, module = path_of(path), _stored(module)
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    state = _chosen(_read(path), own, path)
    if adapt is not None:
        state = adapt(state, own)
    found = _compared(state, own)
    if strict and found.differences and not (fresh_head and found.by_classes):
        raise ValueError(f"{path}{found.refusal(type(module).__name__)}")
    fitting = {key: _dense(state[key]) for key in found.fitting}
    if problems := [problem for key, value in fitting.items() if (problem := _unfit(key, value, own[key]))]:
        more = f" ({len(problems) - 1} more entries are so too)" if len(problems) > 1 else ""
        raise ValueError(f"{path} holds no weights to start from: {problems[0]}{more}")
    module.load_state_dict(fitting, strict=False)
    return found.differences


@dataclass(frozen=True)
class _Comparison:
    """How the entries of a file and of a model's state differ.

    Attributes:
        fitting: names of the entries that both have, in one shape.
        shapes: of the entries that both have in different shapes, these (file, model).
        differences: one line for each other entry.
        by_classes: whether the two differ by the number of classes alone.
        size: number of the model's entries.
    """

    fitting: list[str]
    shapes: list[tuple[Size, Size]]
    differences: list[str]
    by_classes: bool
    size: int

    def refusal(self, model: str) -> str:
        """What is said of a file, after its path, that does not fit a model of this class."""
        if self.by_classes:
            counts = {(file[0], own[0]) for file, own in self.shapes}
            single = len(counts) == 1 and all(
                len(own) <= 2 for _, own in self.shapes
            )  # no convolution, for each anchor
            found, wanted = counts.pop()
            return (
                f": these weights are for {found if single else 'other'} classes, the model has "
                f"{wanted if single else 'its own'} ({self.differences[0]}): build the model with "
                f"{f'num_classes={found}' if single else 'their number'}, or keep its own, untrained head by fresh_head=True"
            )
        listed = "; ".join(self.differences[:LISTED])
        more = f"; and {len(self.differences) - LISTED} more" if len(self.differences) > LISTED else ""
        other = "; this looks like another architecture" if 2 * len(self.fitting) < self.size else ""
        return f" does not fit {model}, {len(self.differences)} entries differ: {listed}{more}{other}"


def _compared(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> _Comparison:
    """A file's entries beside the model's."""
    # Files from before batch norm counted its batches lack the count; PyTorch itself accepts them.
    missing = [key for key in own if key not in state and not _is_count(key)]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    shapes = [(state[key].shape, own[key].shape) for key in reshaped]
    differences = [
        *(f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in reshaped),
        *(f"{key} {tuple(own[key].shape)} is missing" for key in missing),
        *(f"{key} {tuple(state[key].shape)} is unexpected" for key in unexpected),
    ]
    return _Comparison(
        fitting=[key for key, value in state.items() if key in own and value.shape == own[key].shape],
        shapes=shapes,
        differences=differences,
        by_classes=not missing and not unexpected and _differ_by_classes(shapes),
        size=len(own),
    )


def _unfit(key: str, value: Tensor, own: Tensor) -> str | None:
    """Why a tensor of the right shape is no weight; None if it is one."""
    if value.is_meta:
        return f"{key} has a shape but no values: save the model after its weights were loaded"
    if not own.is_floating_point():
        if own.is_complex() or not value.is_complex():
            return None
        return f"{key} is {_kind(value)}, the model's is {_kind(own)}"
    if value.is_quantized or not value.is_floating_point():
        hint = ": are they the codes of a quantised model? Save its weights as floating-point numbers"
        return f"{key} is {_kind(value)}, the model's is {_kind(own)}{'' if value.is_complex() else hint}"
    # In the model's precision, in which large numbers may become infinite. A constant, such as a mask, may be so.
    numbers = value.to(own.dtype)
    bad = ~(numbers.isfinite() | (numbers == own.to(numbers.device)))
    if not bad.any():
        return None
    return f"{key} has {int(bad.sum())} numbers of {bad.numel()} that are not finite: take an earlier checkpoint"


def _dense(value: Tensor) -> Tensor:
    return value if value.layout is torch.strided else value.to_dense()


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors, whole or not at all.

    Raises:
        OSError: the file cannot be written, for example as the disk is full.
    """
    from safetensors.torch import save

    # Copies: the format takes no tensors that share memory, as tied weights do.
    state = _stored(module).state_dict()
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = save(weights)  # as bytes: the library would make a file that only its owner can read
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _stored(module: nn.Module) -> nn.Module:
    """What files have the weights of: the network, or the one in it that has all of them and is told by `stored_network`."""
    inside = getattr(module, "stored_network", None)
    return inside if isinstance(inside, nn.Module) else module


def _differ_by_classes(shapes: list[tuple[Size, Size]]) -> bool:
    """Whether the shapes (file, model) differ by the number of classes alone.

    A detector's heads have a row for each class, or several: one for each anchor, or for each side of a box.
    """
    if any(len(file) == 0 or len(own) == 0 or file[1:] != own[1:] for file, own in shapes):
        return False
    return all(file[0] * shapes[0][1][0] == own[0] * shapes[0][0][0] for file, own in shapes)


def no_file(path: Path) -> str:
    """What is said of a path where a file of weights is expected and is not."""
    if path.is_dir():
        return "it is a folder without a finished run: finish the run with --resume, or name a file of weights"
    return "it is not a regular file, but a device or a pipe" if path.exists() else "there is no such file"


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: {no_file(path)}")
    if path.suffix.lower() != ".safetensors":
        return read_pickle(path, "weights file", skip_objects=True)
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not a weights file, or a damaged or truncated one ({cause(error)})") from error


def read_pickle(path: Path, kind: str, map_location: Any = "cpu", skip_objects: bool = False) -> Any:
    """The plain values and tensors of a file that ``torch.save`` wrote; nothing in it is executed.

    Args:
        path: the file.
        kind: what it should be, for the errors.
        map_location: as in ``torch.load``.
        skip_objects: put an inert :class:`Skipped` in the place of every object of another class, instead of refusing.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    if not Path(path).is_file():  # of a pipe, reading would wait for ever
        raise ValueError(f"{path}: {no_file(Path(path))}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles, before the error that matters
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # readers of damaged files fail in every way
        text = str(error)
        if not isinstance(error, pickle.UnpicklingError) and not re.search("weights[ _]only", text, re.IGNORECASE):
            raise ValueError(f"{path}: not a {kind}, or a damaged or truncated one ({cause(error)})") from error
        reason: Exception = error
    # Not in PyTorch's words: they recommend to load the file all the same.
    needs = re.search(r"GLOBAL ([\w.]{1,200})", str(reason))
    holds = f"it holds Python objects or code ({needs[1]})" if needs else "it seems to hold Python objects or code"
    # PyTorch would run a TorchScript program by other means than a pickle.
    if skip_objects and "TorchScript" not in str(reason):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location, SKIPPING, weights_only=False)  # by what reads no class
        except Code as error:
            holds = f"it holds Python objects or code ({error})"
        except Exception as error:  # readers of damaged files fail in every way
            reason = error
    way_out = f": {SAVE_ALONE}" if skip_objects else ""
    raise ValueError(
        f"{path} is refused: not a {kind} of tensors and plain values alone; {holds}, which are not loaded{way_out}"
    ) from reason


def _is_count(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _chosen(content: Any, own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file under the one prefix under which the names of a model are, without it.

    Where there is none under which half of them are, those of the mapping that checkpoints usually have them in.
    """
    named, nests = _by_name(content, own)
    wanted = {key for key in own if not _is_count(key)} or set(own)
    found: Counter[str] = Counter()
    for name in named:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found[".".join([*parts[:start], ""])] += 1
    most = max(found.values(), default=0)
    if 2 * most < len(wanted) or not named:
        objects = [value.of for _, value in _mappings(content) if isinstance(value, Skipped) and not value]
        if objects and not any(nest.startswith(NESTS) for nest in nests.values()):
            raise ValueError(
                f"{path} holds objects instead of weights ({objects[0]}), which only their own code can read: {SAVE_ALONE}"
            )
        if not named:
            entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
            found_instead = f"entries {entries[:200]}" if entries else type(content).__name__
            raise ValueError(f"{path} holds no state dict: expected names with tensors, found {found_instead}")
        return _usual(named)
    under = {
        prefix: {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        for prefix, count in found.items()
        if count == most
    }
    prefix = _meant(under, own, wanted, path)
    # Beside a student is what it was trained with; beside anything else may be the rest of another network.
    inside = {nests[name] for name in named if name.startswith(prefix)}
    others = [n for n, value in named.items() if nests[n] in inside and not n.startswith(prefix) and value.ndim]
    others = [name for name in others if not FOLLOWERS.search(name)]
    if others and "student" not in prefix.split("."):
        warnings.warn(
            f"{path}: the {len(under[prefix])} tensors under {prefix!r} fit and are taken; {len(others)} beside them, such "
            f"as {others[0]}, are left out",
            stacklevel=3,
        )
    return under[prefix]


def _by_name(content: Any, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, without what wrappers put into names, and the path of the mapping that each is in."""
    parts_of_own = {part for key in own for part in key.split(".")}
    named: dict[str, Tensor] = {}
    nests: dict[str, str] = {}
    for nest, key, value in _tensors(content):
        name = ".".join(part for part in f"{nest}{key}".split(".") if part not in WRAPPERS or part in parts_of_own)
        named[name], nests[name] = value, nest
    return named, nests


def _meant(
    under: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Tensor], wanted: AbstractSet[str], path: Path
) -> str:
    """The prefix, of those with equally many of a model's names, whose tensors are nearest to the model's."""

    def distance(prefix: str) -> tuple[int, int]:
        state = under[prefix]
        return sum(own[key].shape != state[key].shape for key in wanted & state.keys()), len(state.keys() - own.keys())

    nearest = min(map(distance, under))
    best = [prefix for prefix in under if distance(prefix) == nearest]
    for preferred in (
        [prefix for prefix in best if "student" in prefix.split(".")],
        [prefix for prefix in best if not FOLLOWERS.search(prefix)],
    ):
        best = preferred if len(best) > 1 and preferred else best
    if len(best) > 1:
        places = ", ".join(repr(prefix.removesuffix(".")) for prefix in sorted(best))
        raise ValueError(
            f"{path} holds weights that fit in several places, {places}: save a file with those that are meant"
        )
    return best[0]


def _mappings(content: Any, nest: str = "") -> Iterator[tuple[str, Any]]:
    """A mapping and those in it, each once and not too deep, with their paths; also an object that was skipped."""
    seen: set[int] = set()
    layer = [(nest, content)]
    for _ in range(DEEPEST):
        following = []
        for path, mapping in layer:
            if isinstance(mapping, Mapping) and id(mapping) not in seen:
                seen.add(id(mapping))
                yield path, mapping
                following += [(f"{path}{key}.", value) for key, value in mapping.items() if isinstance(value, Mapping)]
        layer = following


def _tensors(content: Any) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors of nested mappings: the path of the mapping, the key, the tensor."""
    for nest, mapping in _mappings(content):
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                yield nest, str(key), value


def _usual(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the mapping that a checkpoint usually has its weights in."""
    for nest in NESTS:
        if inside := {
            name.removeprefix(f"{nest}."): value for name, value in named.items() if name.startswith(f"{nest}.")
        }:
            return _usual(inside)
    return named

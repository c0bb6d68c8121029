"""Pickles whose objects are skipped: tensors and plain values are read, no class is imported and no code runs."""

from __future__ import annotations

import collections
import pickle
import types
from typing import Any, ClassVar

import torch

_InPython: Any = pickle._Unpickler  # the one of which opcodes can be replaced


class Skipped(dict[Any, Any]):
    """What stands for an object of a class that is not loaded; of one that is a mapping it has the items.

    ``of`` is the full name of the class.
    """

    of = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key, as a path is
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def append(self, item: Any) -> None:
        """Leave an item of a sequence or set out."""

    add = extend = append


class Code(pickle.UnpicklingError):
    """A file wants what no data is made of."""


# The types of data among what may be asked for by these names; the rest reads attributes, opens files, runs programs.
_BUILTINS = "set frozenset list dict tuple int float complex bool str bytes bytearray slice range object".split()
_NOT_DATA = "builtins __builtin__ os posix nt sys subprocess shutil importlib runpy ctypes socket operator".split()
_TENSORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(_InPython):  # type: ignore[misc]
    """Makes tensors and plain values, and puts a :class:`Skipped` in the place of everything else.

    Every way in which a pickle calls or changes something is replaced below: nothing is imported, and nothing but the
    functions of ``_TENSORS`` is called. So it is as safe as PyTorch's own reader of weights, which refuses such files.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_InPython.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The function or class of a tensor, or a class that stands for any other."""
        if (module, name) in _TENSORS:
            return _TENSORS[module, name]
        full = f"{module}.{name}"
        if module.partition(".")[0] in _NOT_DATA and name not in _BUILTINS:
            raise Code(full)
        return type("Skipped", (Skipped,), {"of": full})

    def _made(self, function: Any, args: tuple[Any, ...], options: dict[str, Any] | None = None) -> Any:
        if isinstance(function, type) and issubclass(function, Skipped):
            return function()
        if not any(function is known for known in _TENSORS.values()):
            raise Code(f"a call of {type(function).__name__}")
        return function(*args, **options or {})

    def load_reduce(self) -> None:
        """Call what makes tensors."""
        args = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)

    def load_newobj(self) -> None:
        """Likewise."""
        args = self.stack.pop()
        self.stack.append(self._made(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        """Likewise."""
        options, args = self.stack.pop(), self.stack.pop()
        self.stack.append(self._made(self.stack.pop(), args, options))

    def _instantiate(self, klass: Any, args: Any) -> None:
        """Likewise, for the opcodes INST and OBJ."""
        self.append(self._made(klass, tuple(args)))

    def load_build(self) -> None:
        """Leave the attributes of an object out; tensors that are not made by the functions above have theirs there."""
        self.stack.pop()
        if not isinstance(self.stack[-1], Skipped | collections.OrderedDict):
            raise Code(f"a state of {type(self.stack[-1]).__name__}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build


# What `torch.load` takes in the place of the module `pickle`.
SKIPPING = types.ModuleType("matchdistill.models.skipping")
SKIPPING.Unpickler = _Unpickler  # type: ignore[attr-defined]
SKIPPING.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]

"""Functions of the user's own, by name."""

from __future__ import annotations

import importlib
import operator
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matchdistill.messages import cause, did_you_mean


def own_function(name: str, what: str, others: Iterable[str] = (), kind: str = "function") -> Callable[..., Any]:
    """The function, or other callable, that ``package.module:function`` names. The current folder is searched too.

    Args:
        name: two parts with a colon between; the second one may be ``Class.method``.
        what: what errors call it.
        others: names that could have been meant in place of the module.
        kind: what is looked for, for errors.

    Raises:
        ValueError: there is no such module or function (the nearest are suggested), or the import fails.

    Examples:
        >>> own_function("math:sqrt", "function")(9)
        3.0
    """
    module_name, _, function_name = name.partition(":")
    # As with `python -m`, the folder in which the command runs comes first.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code can fail in every way
        # A missing module is either the one that was asked for or one that it imports.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            hint = did_you_mean(module_name, _modules_near(module_name, others))
            raise ValueError(f"{what} {name!r}: there is no library or module {error.name!r}{hint}") from error
        raise ValueError(f"{what} {name!r}: importing {module_name!r} failed with {cause(error)}") from error
    function: Callable[..., Any] | None
    try:
        function = operator.attrgetter(function_name)(module)
    except AttributeError:
        function = None
    if not callable(function):
        hint = did_you_mean(function_name, [key for key, value in vars(module).items() if callable(value)])
        raise ValueError(f"{what} {name!r}: module {module_name!r} has no {kind} {function_name!r}{hint}")
    return function


def _modules_near(module_name: str, others: Iterable[str]) -> list[str]:
    """What could have been meant: the modules of the innermost package that exists, else all at the top level."""
    while module_name := module_name.rpartition(".")[0]:
        if package := sys.modules.get(module_name):  # imported on the way to the missing module
            return [f"{module_name}.{info.name}" for info in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return [*others, *(info.name for info in pkgutil.iter_modules())]

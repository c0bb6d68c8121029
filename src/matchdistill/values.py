"""YAML from people, in files and in options: what is doubtful or would never end is refused before it is read."""

from __future__ import annotations

import contextlib
import re
from argparse import Action
from collections import Counter
from pathlib import Path
from types import FunctionType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from matchdistill.messages import did_you_mean

OPTIONS = "matchdistill"  # what jsonargparse knows the reader of options by
LONGEST = 1_000_000  # characters; the longest recipe has some thousands
MOST = 100_000  # values, those that an alias stands for counted each time


class _HelpFormatter(DefaultHelpFormatter):
    """Help in which functions that read a value are called "path", as they all read one."""

    def _get_type_str(self, action: Action) -> str | None:
        return "path" if isinstance(action.type, FunctionType) else super()._get_type_str(action)


class OptionParser(ArgumentParser):
    """A parser of options that names the nearest ones where there is none of a name; beginnings of names are not taken."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error of arguments that do not fit."""
        if "did you mean" not in message and (
            found := re.match(r"unrecognized arguments: (--[^\s=]+)", message, re.IGNORECASE)
        ):
            known = [name for action in self._actions for name in action.option_strings if not name.endswith("+")]
            longer = [name for name in known if name.startswith(found[1])]
            message += did_you_mean(found[1], longer) or did_you_mean(found[1], known)
        elif found := re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)$', message, re.DOTALL):
            message = self.expected(found[1], found[2]) or message
        super().error(message, ex)

    def expected(self, key: str, value: str) -> str | None:
        """What is said of a value that an option does not take; None: there is no such option."""
        hints = [action._typehint for action in self._actions if action.dest == key and hasattr(action, "_typehint")]
        if not hints:
            return None
        near = did_you_mean(value, [str(each) for each in choices_of(hints[0])])
        return f"{key} is {value!r}: expected {in_words(hints[0])}{near}"


def choices_of(hint: Any) -> list[Any]:
    """The values that a type lists.

    Examples:
        >>> choices_of(Literal["mean", "sum"] | None)
        ['mean', 'sum']
    """
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [each for part in get_args(hint) for each in choices_of(part)] if _is_union(hint) else []


def in_words(hint: Any) -> str:
    """What a type takes, for somebody who writes a recipe.

    Examples:
        >>> in_words(float | None), in_words(list[int]), in_words(int | Literal["auto"])
        ('a number or null', 'a list of whole numbers', "a whole number or 'auto'")
    """
    if get_origin(hint) is Literal:
        return " or ".join([", ".join(map(repr, get_args(hint)[:-1])), repr(get_args(hint)[-1])]).removeprefix(" or ")
    if _is_union(hint):
        return " or ".join(map(in_words, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        inside = [part for part in get_args(hint) if part is not Ellipsis]
        each = MANY.get(inside[0]) if len(set(inside)) == 1 else None
        return f"a list of {each}" if each else "a list"
    return ONE.get(get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


ONE: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a mapping {name: value}",
    type(None): "null",
}
MANY: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "names", dict[str, Any]: "mappings {name: value}"}


def read_yaml(text: str | bytes) -> Any:
    """The plain values of a YAML document.

    Raises:
        ValueError: in one line, why it has none: it is damaged, has a key twice, or more values than anybody writes, which
            aliases of aliases come to.
    """
    try:
        check_yaml(text)
        values = yaml.safe_load(text)
        _check_plain(values)
        return values
    except Exception as error:  # wrong dates, numbers and tags fail in every way
        raise ValueError(" ".join(str(error).split())) from error


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        for part in value:
            _check_plain(part)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"it has a {type(value).__name__}, {value!r}: expected numbers, text, lists and mappings")


def check_yaml(text: str | bytes) -> None:
    """Raise a ValueError if a YAML document is one that `read_yaml` refuses for more than its grammar."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _count(root, {}) > MOST:
            raise ValueError(f"its aliases expand to more than {MOST} values")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _count(node: Node, counts: dict[Node, int | None]) -> int:
    """How many values a node stands for; None in `counts` marks one that is being counted."""
    if node in counts:
        known = counts[node]
        if known is None:
            raise ValueError(f"{_place(node)} contains itself through an alias")
        return known
    counts[node] = None
    total = 1
    if isinstance(node, MappingNode):
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, ScalarNode))
        twice = [name for (_, name), count in keys.items() if count > 1]
        if twice:
            raise ValueError(f"{_place(node)} has the key {twice[0]!r} twice")
        total += sum(_count(part, counts) for pair in node.value for part in pair)
    elif isinstance(node, SequenceNode):
        total += sum(_count(part, counts) for part in node.value)
    counts[node] = total
    return total


def _place(node: Node) -> str:
    kind = "mapping" if isinstance(node, MappingNode) else "list"
    return f"the {kind} in line {node.start_mark.line + 1}"


def _read_option(text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that is not UTF-8
        return text
    with contextlib.suppress(yaml.YAMLError):  # such a text may be what an option takes; else the reader tells it
        check_yaml(text)
    return _read_checked(text)


_read_checked = get_loader("yaml")
set_loader(OPTIONS, _read_option, (yaml.YAMLError,))

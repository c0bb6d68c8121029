"""Where the output of a classifier holds its logits.

Axes: N batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Place = tuple[str | int, ...]  # the keys and numbers that lead into nested outputs


def logits_place(output: Any, num_classes: int, alike: Tensor | None = None) -> Place:
    """Where an output holds logits (N, num_classes).

    An output is a tensor, or tensors in nested tuples, lists, dictionaries and dataclasses. Of several that fit the one
    called "logits" is taken, else the one that is alike, else the first: auxiliary classifiers come behind.

    Args:
        output: what a network returned.
        num_classes: number of classes.
        alike: the logits (N, num_classes) that the network gives in evaluation mode, if they are known.

    Raises:
        ValueError: no tensor fits.

    Examples:
        >>> import torch
        >>> logits_place({"features": torch.zeros(2, 8), "logits": torch.zeros(2, 5)}, 5)
        ('logits',)
    """
    tensors = dict(_tensors(output))
    places = [place for place, value in tensors.items() if value.ndim == 2 and value.shape[1] == num_classes]
    if not places:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors.values()) or type(output).__name__
        raise ValueError(
            f"gives {shapes}: expected logits (N, {num_classes}), alone or in a tuple, dictionary or dataclass"
        )
    named = [place for place in places if place and place[-1] == "logits"]
    if not named and alike is not None:
        named = [place for place in places if tensors[place].shape == alike.shape and tensors[place].allclose(alike)]
    return (named or places)[0]


def _tensors(output: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors of an output with their places."""
    if isinstance(output, Tensor):
        yield place, output
        return
    for key, value in _entries(output):
        yield from _tensors(value, (*place, key))


def _entries(output: Any) -> list[tuple[str | int, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    return list(enumerate(output)) if isinstance(output, (tuple, list)) else []


def tensor_at(output: Any, place: Place) -> Tensor:
    """The tensor at a place of an output."""
    for key in place:
        output = output[key] if isinstance(key, int) or isinstance(output, Mapping) else getattr(output, key)
    tensor: Tensor = output
    return tensor

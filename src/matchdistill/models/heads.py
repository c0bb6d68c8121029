"""The heads of networks: what makes classes of the pooled features, and the network without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.models.build import build_model, weights_file
from matchdistill.models.weights import load_weights


def head_paths(model: nn.Module, other: nn.Module) -> list[str]:
    """The paths of a network's heads: the modules whose tensors have other shapes for another number of classes.

    Args:
        model: the network.
        other: the same for another number of classes.
    """
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    differing = (name for name, value in model.state_dict().items() if shapes.get(name, value.shape) != value.shape)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in differing))


def build_body(name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a network by name without its head, whose output is what the head would take: pooled features, as a rule.

    The head, if there is one, is an `nn.Identity` in its place: all other weights keep their names.

    Args:
        name: as `build_model` takes it.
        weights: likewise; what a file holds for a head is left out.
        options: passed on to the function that builds the network.

    Raises:
        ValueError: an unknown name, weights that do not fit or cannot be had, or a head that is no module of its own.

    Examples:
        >>> body = build_body("matchdistill.models:small_resnet", width=8)
        >>> body(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 32])
    """
    file = None if weights is None else weights_file(str(weights))
    model = build_model(name, 2, weights if file is None else None, **options)
    with torch.random.fork_rng(devices=[]):
        heads = head_paths(model, build_model(name, 3, **options))
    for path in heads:
        if not path:
            raise ValueError(f"model {name!r} cannot be taken without its head, which is no module of its own")
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    if file is not None:

        def without_heads(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
            inside = tuple(f"{path}." for path in heads)
            return {key: value for key, value in state.items() if key in own or not key.startswith(inside)}

        load_weights(model, file, adapt=without_heads)
    return model

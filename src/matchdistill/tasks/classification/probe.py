"""The head of a classifier: how it starts, and a body that is frozen, so that only the head learns."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from matchdistill.models.build import build_model, weightless
from matchdistill.models.heads import head_paths
from matchdistill.runs.settings import Model


def heads_of(student: nn.Module, named: Model, num_classes: int, option: str) -> list[nn.Module]:
    """The heads of a student.

    Args:
        student: the network.
        named: what it was built by.
        num_classes: likewise.
        option: what needs them, by its name in recipes.

    Raises:
        ValueError: it has no head, or one that is no module of its own.
    """
    assert named.name is not None
    with torch.random.fork_rng(devices=[]):
        heads = head_paths(student, build_model(named.name, num_classes + 1, **weightless(named.options)))
    if not heads or "" in heads:
        raise ValueError(
            f"{option}: model {named.name!r} has no head of its own, a module whose size is the number of classes: "
            "leave the option out"
        )
    return [student.get_submodule(path) for path in heads]


def start_heads(student: nn.Module, named: Model, num_classes: int, deviation: float) -> None:
    """Give the heads normal weights of mean zero, and biases of zero; further arguments and errors are of `heads_of`."""
    for head in heads_of(student, named, num_classes, "training.head_std"):
        for weight in head.parameters():
            nn.init.normal_(weight, std=deviation) if weight.ndim > 1 else nn.init.zeros_(weight)


def freeze_body(student: nn.Module, named: Model, num_classes: int) -> None:
    """Leave the heads of a student alone to be trained, for good; arguments and errors are of `heads_of`."""
    heads = heads_of(student, named, num_classes, "training.frozen")
    if named.weights is None:
        warnings.warn(
            "training.frozen: the body starts from random weights and keeps them: give student.weights", stacklevel=2
        )
    student.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)


def body_in_evaluation_mode(student: nn.Module) -> None:
    """Put all of a student into evaluation mode but the modules that are trained."""
    student.eval()
    for module in student.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            module.train()

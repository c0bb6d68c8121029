"""A classifier whose body is frozen: only its head learns."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from matchdistill.models.build import build_model, weightless
from matchdistill.models.heads import head_paths
from matchdistill.runs.settings import Model


def freeze_body(student: nn.Module, named: Model, num_classes: int) -> None:
    """Leave the head of a student alone to be trained, for good.

    Args:
        student: the network.
        named: what it was built by.
        num_classes: likewise.

    Raises:
        ValueError: it has no head, or one that is no module of its own.
    """
    assert named.name is not None
    with torch.random.fork_rng(devices=[]):
        heads = head_paths(student, build_model(named.name, num_classes + 1, **weightless(named.options)))
    if not heads or "" in heads:
        raise ValueError(
            f"training.frozen: model {named.name!r} has no head of its own, a module whose size is the number of classes: "
            "train all of it"
        )
    if named.weights is None:
        warnings.warn(
            "training.frozen: the body starts from random weights and keeps them: give student.weights", stacklevel=2
        )
    student.requires_grad_(False)
    for path in heads:
        student.get_submodule(path).requires_grad_(True)


def body_in_evaluation_mode(student: nn.Module) -> None:
    """Put all of a student into evaluation mode but the modules that are trained."""
    student.eval()
    for module in student.modules():
        if any(weight.requires_grad for weight in module.parameters(recurse=False)):
            module.train()

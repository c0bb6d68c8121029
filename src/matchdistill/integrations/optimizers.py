"""The student-side normalisation in somebody else's optimiser: its parameters, and the group that trains them."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.optim import Optimizer

from matchdistill.features import FeatureDistiller


def positions_of(distiller: FeatureDistiller) -> nn.Module:
    """The positions of a distiller as one module: matching, margins and normalisation, without the student."""
    return cast("nn.Module", distiller.positions)


def group_of_scales(student: nn.Module, optimizer: Optimizer) -> int:
    """The number of the parameter group that the student's scales and biases are in, else of the first with any of its.

    In a group of its own, a scheduler that was made before could not set the normalisation's learning rate.

    Raises:
        ValueError: the optimiser trains no parameter of the student, though some are to be trained.
    """
    of_student = {id(parameter) for parameter in student.parameters()}
    shares = [
        [parameter for parameter in group["params"] if id(parameter) in of_student] for group in optimizer.param_groups
    ]
    # A student that is frozen at first may come to the optimiser later.
    if not any(shares) and any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "the optimiser trains no parameter of the student: expected one that does, to train the student-side "
            "normalisation with"
        )
    scales = [any(parameter.ndim == 1 for parameter in share) for share in shares]
    chosen = scales if any(scales) else [bool(share) for share in shares]
    return chosen.index(True) if any(chosen) else 0

"""The optimiser of a network, and its learning rate at every step."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from matchdistill.runs.training import SGD, Training, new_optimizer

ATTENTION = re.compile(r"(attention|attn)(?!.*pool)", re.IGNORECASE)  # in names of classes
LEAST_SHARE = 0.15  # of a block's weights that attention between positions has; gates of channels have less


def is_transformer(network: nn.Module) -> bool:
    """Whether most weights of a network are in blocks with attention; convolutions are not counted.

    Examples:
        >>> is_transformer(nn.TransformerEncoderLayer(8, 2, 32)), is_transformer(nn.Conv2d(3, 8, 3))
        (True, False)
    """
    counted: dict[int, int] = {}
    for block in network.modules():
        weights = _weights(block)
        attentions = [_weights(child) for child in block.children() if ATTENTION.search(type(child).__name__)]
        if sum(sum(each.values()) for each in attentions) > LEAST_SHARE * sum(weights.values()):
            counted |= weights
    return 2 * sum(counted.values()) > sum(parameter.numel() for parameter in network.parameters())


def _weights(module: nn.Module) -> dict[int, int]:
    """The sizes of a module's parameters but those of convolutions, by identity."""
    convolutions = {
        id(each) for part in module.modules() if isinstance(part, nn.Conv2d) for each in part.parameters(recurse=False)
    }
    return {id(each): each.numel() for each in module.parameters() if id(each) not in convolutions}


def build_optimizer(module: nn.Module, network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser of settled settings for a module and the network in it.

    Args:
        module: all of its parameters are trained.
        network: the part of it whose layers decide about decay, by layer or of norms.
        training: with nothing left to choose.
    """
    if training.optimizer == SGD and training.decay_norms and training.layer_decay is None:
        return new_optimizer(module.parameters(), training)
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]

    options: dict[str, Any] = {
        "weight_decay": training.weight_decay,
        "weight_decay_exclude_1d": not training.decay_norms,
        "no_weight_decay_list": () if training.decay_norms else getattr(network, "no_weight_decay", tuple)(),
    }
    if training.layer_decay is None:
        groups = param_groups_weight_decay(network, **options)
    else:
        groups = param_groups_layer_decay(network, **options, layer_decay=training.layer_decay)
    own = {id(parameter) for parameter in network.parameters()}
    others = [each for each in module.parameters() if each.requires_grad and id(each) not in own]
    for free in (False, True):
        if parameters := [each for each in others if (not training.decay_norms and each.ndim <= 1) == free]:
            groups.append({"params": parameters, "weight_decay": 0.0 if free else training.weight_decay})
    assert training.lr is not None
    for group in groups:
        group["lr"] = training.lr * group.pop("lr_scale", 1.0)  # which timm's own schedulers would look at
    return new_optimizer([group for group in groups if group["params"]], training)


class Plateau:
    """Lowers a schedule's learning rate when validations are no better any more.

    Args:
        ramp: the schedule, by the step.
        training: its factor and patience.
        higher_is_better: of what is validated.
    """

    def __init__(self, ramp: LambdaLR, training: Training, higher_is_better: bool) -> None:
        self._ramp, self._factor = ramp, training.gamma
        mode: Literal["max", "min"] = "max" if higher_is_better else "min"
        self._watch = ReduceLROnPlateau(ramp.optimizer, mode, training.gamma, training.patience, eps=0.0, min_lr=0.0)

    def step(self, value: float) -> None:
        """Take what a validation came to."""
        before = [group["lr"] for group in self._ramp.optimizer.param_groups]
        self._watch.step(value)
        if before != [group["lr"] for group in self._ramp.optimizer.param_groups]:
            self._ramp.base_lrs = [rate * self._factor for rate in self._ramp.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """What it has seen; what it has lowered is the schedule's."""
        return self._watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._watch.load_state_dict(state)


POWER = 0.9  # of "poly", as L.-C. Chen et al. have it, "DeepLab", arXiv 1606.00915


def lr_factor(schedule: Training, epoch: float) -> float:
    """The learning rate at a moment in epochs, warm-up by epochs included, relative to the highest one.

    Examples:
        >>> [round(lr_factor(Training(warmup_epochs=10), epoch), 3) for epoch in (0, 5, 10, 40.9, 41, 91)]
        [0.1, 0.55, 1.0, 1.0, 0.1, 0.001]
    """
    if epoch < schedule.warmup_epochs:
        return 0.1 + 0.9 * epoch / schedule.warmup_epochs
    epoch -= schedule.warmup_epochs
    if schedule.schedule in ("constant", "plateau"):
        return 1.0
    if schedule.schedule in ("cosine", "poly"):
        least = schedule.final_lr / schedule.lr if schedule.final_lr and schedule.lr else 0.0
        done = min(1.0, epoch / schedule.epochs)
        falling = (1 - done) ** POWER if schedule.schedule == "poly" else 0.5 + 0.5 * math.cos(math.pi * done)
        return least + (1 - least) * falling
    return schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)


def warmup_factor(schedule: Training, step: int) -> float:
    """What the learning rate is multiplied by in the first steps.

    Examples:
        >>> [warmup_factor(Training(warmup_steps=1000), step) for step in (0, 500, 1000, 9000)]
        [0.001, 0.5005, 1.0, 1.0]
    """
    return 0.001 + 0.999 * step / schedule.warmup_steps if step < schedule.warmup_steps else 1.0

"""The settings by which a network is trained. Their docstring is the command line's help."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from matchdistill.data.module import Sources
from matchdistill.messages import cause, did_you_mean, number, whole

SGD = "sgd"
# What is not given, by optimiser.
FITTING: dict[str, dict[str, Any]] = {
    SGD: {"lr": 0.1, "weight_decay": 1e-4, "schedule": "steps"},
    "adamw": {"lr": 5e-4, "weight_decay": 0.05, "schedule": "cosine"},
}
FAMILY = ("optimizer", "lr", "weight_decay", "schedule")  # one of them given: the network's family chooses none


@dataclass
class Training:
    """How a network is trained.

    Args:
        epochs: passes over the training images, without the warm-up.
        optimizer: "sgd", or any of timm's, as "adamw" or "lamb". null: "sgd"; but "adamw" for a transformer of whose
            optimizer, lr, weight_decay and schedule none is given.
        lr: learning rate at its highest; null: 0.1 of "sgd", 0.0005 of "adamw".
        momentum: of SGD, and of others that have one.
        nesterov: with "sgd", look ahead by the momentum.
        weight_decay: of the optimiser; null: 0.0001 of "sgd", 0.05 of "adamw".
        decay_norms: whether norms and biases decay too; null: with "sgd" alone.
        layer_decay: factor of the learning rate from each layer to the one below it, as timm groups them; null: 1.
        optimizer_options: further arguments of the optimiser, as {betas: [0.9, 0.98]}.
        clip_grad_norm: the largest norm of all gradients together, to which larger ones are scaled; null: any.
        schedule: "steps": times `gamma` at each milestone; "cosine": down to `final_lr` over the epochs;
            "poly": as the power 0.9 of the epochs that are left, usual in segmentation; "constant"; "plateau": times
            `gamma` when the validation is no better for `patience` validations; null: "steps" with "sgd", "cosine" with
            "adamw".
        milestones: epochs, from 0, at whose start "steps" lowers the learning rate.
        gamma: the factor of "steps" and "plateau".
        patience: validations in a row without a better one that "plateau" allows.
        final_lr: where "cosine" and "poly" end.
        warmup_epochs: epochs before the others in which the learning rate rises from a tenth.
        warmup_steps: steps at the start of the epochs in which it rises from a thousandth of what it would be.
        validate_every: epochs between validations; the last epoch is always validated.
        accumulate: batches whose gradients make one step; at the end of an epoch those that are left do.
        loss: on the labels: "ce", cross-entropy; "bce", binary cross-entropy of each class, its mean; "ce+dice", of pixels
            also one minus the mean Dice coefficient; "none": the student learns from its teacher alone, by a method with
            "kd".
        label_smoothing: the share of a label that is spread over all classes.
        class_weights: of the loss on labels, a number for each class; "balanced": by the reciprocals of their counts.
        mixup: alpha of mixup, 1 for even shares of two images; 0: none. Teacher and student see the same mixed images.
        cutmix: alpha of CutMix; with both, either is drawn for a batch.
        frozen: train the head alone: the body keeps its weights and, in evaluation mode, its statistics. For a linear probe.
        head_std: deviation of the normal numbers that the head's weights start from, with biases of zero: 0.01 for a linear
            probe as MoCo's; null: the head starts as its network has it.
        repeated_augmentation: how often each image comes in a batch, varied anew each time; an epoch is as long as with 1,
            and takes that part of the images only.
        ema: decay, per step, of a moving average of the weights, which is validated and saved in their place; null: none.
        stop_after: validations in a row without a better one after which the training ends; null: it takes all epochs.
        max_time: how long one call of the command trains, its teacher too: "8h", "1d12h", "90m", or "HH:MM:SS" or
            "DD:HH:MM:SS" as Lightning has it. Then it ends after the epoch, and --resume goes on; null: to the end.
        keep_best: keep, beside the last student, the one of the best validation, as best.safetensors.
    """

    sources: ClassVar[Sources] = {
        "torch": ("momentum", "nesterov", "loss", "class_weights", "patience"),
        "timm": ("decay_norms", "layer_decay", "mixup", "cutmix", "repeated_augmentation"),
        "torch, timm": ("optimizer", "lr", "weight_decay", "optimizer_options", "label_smoothing"),
        "Lightning": ("epochs", "clip_grad_norm", "accumulate", "validate_every"),
    }

    epochs: int = 120
    optimizer: str | None = None
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float | None = None
    decay_norms: bool | None = None
    layer_decay: float | None = None
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    clip_grad_norm: float | None = None
    schedule: Literal["steps", "cosine", "poly", "constant", "plateau"] | None = None
    milestones: list[int] = field(default_factory=lambda: [31, 61, 81])
    gamma: float = 0.1
    patience: int = 5
    final_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_steps: int = 0
    validate_every: int = 1
    accumulate: int = 1
    loss: Literal["ce", "bce", "ce+dice", "none"] = "ce"
    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    frozen: bool = False
    head_std: float | None = None
    repeated_augmentation: int = 1
    ema: float | None = None
    stop_after: int | None = None
    max_time: str | None = None
    keep_best: bool = False

    @property
    def of_labels(self) -> list[str]:
        """The names of the settings, of those that are not at their defaults, that need images with one label each."""
        names = ("loss", "label_smoothing", "class_weights", "mixup", "cutmix", "frozen", "head_std")
        return [name for name in names if getattr(self, name) not in ("ce", None, 0)]

    @property
    def measuring(self) -> Iterator[tuple[str, str]]:
        """The settings that need students to be measured, each with what to do where they are not."""
        if self.schedule == "plateau":
            yield "schedule is 'plateau'", "choose another one"
        if self.stop_after is not None:
            yield f"stop_after is {self.stop_after}", "leave it out"
        if self.keep_best:
            yield "keep_best is true", "leave it out"

    @property
    def all_epochs(self) -> int:
        """Epochs with the warm-up, which is added to them."""
        return self.epochs + self.warmup_epochs

    @property
    def left_to_family(self) -> bool:
        """Whether the family of the network chooses the optimiser."""
        return all(getattr(self, name) is None for name in FAMILY)

    def settled(self, transformer: bool = False) -> Training:
        """The settings with a value for everything that is chosen where it is not given.

        Args:
            transformer: whether the network is one.

        Examples:
            >>> Training().settled().lr, Training().settled(transformer=True).optimizer
            (0.1, 'adamw')
            >>> Training(lr=0.2).settled(transformer=True).optimizer
            'sgd'
        """
        optimizer = self.optimizer or ("adamw" if transformer and self.left_to_family else SGD)
        values = {"optimizer": optimizer, "decay_norms": optimizer == SGD, **FITTING.get(optimizer, FITTING["adamw"])}
        return dataclasses.replace(
            self, **{name: value for name, value in values.items() if getattr(self, name) is None}
        )

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        for name in ("epochs", "warmup_epochs", "warmup_steps"):
            yield from whole(f"{prefix}.{name}", getattr(self, name), 0)
        yield from number(f"{prefix}.lr", self.lr, 0, above=True)
        yield from number(f"{prefix}.momentum", self.momentum, 0, below=1)
        yield from number(f"{prefix}.weight_decay", self.weight_decay, 0)
        if self.layer_decay != 1:
            yield from number(f"{prefix}.layer_decay", self.layer_decay, 0, below=1, above=True)
        yield from number(f"{prefix}.clip_grad_norm", self.clip_grad_norm, 0, above=True)
        yield from number(f"{prefix}.gamma", self.gamma, 0, above=True)
        yield from whole(f"{prefix}.patience", self.patience, 0)
        yield from number(f"{prefix}.final_lr", self.final_lr, 0)
        for milestone in self.milestones:
            yield from whole(f"{prefix}.milestones", milestone, 0)
        yield from whole(f"{prefix}.validate_every", self.validate_every, 1, hint=" (1: every epoch)")
        yield from whole(f"{prefix}.stop_after", self.stop_after, 1)
        if self.max_time is not None and not seconds_of(self.max_time):
            yield f"{prefix}.max_time is {self.max_time!r}: expected a time like '8h', '1d12h', '90m' or '01:30:00'"
        yield from whole(f"{prefix}.accumulate", self.accumulate, 1, hint=" (1: a step for every batch)")
        yield from number(f"{prefix}.ema", self.ema, 0, below=1)
        yield from number(f"{prefix}.label_smoothing", self.label_smoothing, 0, below=1)
        yield from number(f"{prefix}.mixup", self.mixup, 0)
        yield from number(f"{prefix}.cutmix", self.cutmix, 0)
        yield from number(f"{prefix}.head_std", self.head_std, 0, above=True)
        yield from whole(f"{prefix}.repeated_augmentation", self.repeated_augmentation, 1)
        for weight in self.class_weights if isinstance(self.class_weights, list) else []:
            yield from number(f"{prefix}.class_weights", weight, 0)
        yield from self._optimizer_problems(prefix)

    def _optimizer_problems(self, prefix: str) -> Iterator[str]:
        if self.optimizer not in (None, SGD):
            known = optimizer_names()
            if self.optimizer not in known:
                near = did_you_mean(self.optimizer, known) or f": expected one of {', '.join(known)}"
                yield f"{prefix}.optimizer is {self.optimizer!r}, which is none that timm has{near}"
                return
            for name in ("lr", "weight_decay"):
                if self.optimizer not in FITTING and getattr(self, name) is None:
                    yield f"{prefix}.optimizer is {self.optimizer!r}: give {prefix}.{name}, as fits it"
        for name in self.optimizer_options:
            if name in ("params", "lr", "momentum", "nesterov", "weight_decay"):
                yield f"{prefix}.optimizer_options.{name} cannot be given: use {prefix}.{name}"
                return
        if self.optimizer_options or self.optimizer not in (None, SGD):
            try:
                new_optimizer([nn.Parameter(torch.zeros(2, 2))], dataclasses.replace(self.settled(), lr=0.1))
            except Exception as error:  # its arguments are anybody's
                yield f"{prefix}.optimizer_options do not fit {self.settled().optimizer!r} ({cause(error)})"


TIMES = (
    re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?"),
    re.compile(r"(?:(?P<d>\d+):)?(?P<h>\d+):(?P<m>\d\d):(?P<s>\d\d)"),
)
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(time: str) -> int | None:
    """The seconds of a time, as `Training.max_time` has it; None: it is none.

    Examples:
        >>> seconds_of("1h30m"), seconds_of("01:30:00"), seconds_of("1:00:00:00"), seconds_of("soon")
        (5400, 5400, 86400, None)
    """
    found = next(filter(None, (form.fullmatch(time) for form in TIMES)), None)
    return None if found is None else sum(SECONDS[unit] * int(count or 0) for unit, count in found.groupdict().items())


def optimizer_names() -> list[str]:
    """Everything that `Training.optimizer` can be: "sgd", and the others of timm, but for those of second derivatives."""
    import timm.optim

    infos = (timm.optim.get_optimizer_info(str(name)) for name in timm.optim.list_optimizers())  # type: ignore[attr-defined]
    return [info.name for info in infos if not info.second_order]


def new_optimizer(parameters: Any, training: Training) -> torch.optim.Optimizer:
    """The optimiser of settled settings for parameters or groups of them, "sgd" by torch and all others by timm.

    Raises:
        Exception: options that it does not have, or a package that it needs is missing.
    """
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay, "momentum": training.momentum}
    if training.optimizer == SGD:
        nesterov = training.nesterov and training.momentum > 0
        return torch.optim.SGD(parameters, **options, nesterov=nesterov, **training.optimizer_options)
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            parameters, training.optimizer or SGD, **options, **training.optimizer_options
        )
    return optimizer

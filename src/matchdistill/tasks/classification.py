"""Classification: cross-entropy, with the guidance of a teacher.

Axes: N batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from matchdistill.capture import Capture
from matchdistill.data.tensors import IMAGENET_MEAN, IMAGENET_STD
from matchdistill.features import FeatureDistiller
from matchdistill.functional import kd_loss
from matchdistill.probing import scratch
from matchdistill.runs.settings import Distillation, Training
from matchdistill.tasks.base import Task
from matchdistill.teacher import FrozenTeacher, shared_modules


class Classification(Task):
    """Trains a student on labels, and on its teacher's features (MGD or others), outputs (KD), both or neither.

    Args:
        student: images (N, 3, H, W) -> logits (N, num_classes).
        num_classes: number of classes.
        training: optimiser and schedule.
        distillation: how the teacher guides.
        teacher: the teacher of "kd" without features; with a distiller, its own is used.
        distiller: the distiller of the student, for methods with features.
        prepare: as of `FrozenTeacher`, for "kd" without features.

    Attributes:
        logits_at: where the student's output in training mode holds the logits, as of `logits_place`; None: it is they, or
            this is found out at the first step.
    """

    metric = "top1"
    logits_at: Place | None = None

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        training: Training,
        distillation: Distillation,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        measures, self._num_classes = (_accuracy(num_classes), _accuracy(num_classes)), num_classes
        super().__init__(student, training, distillation, measures, distiller)
        self._capture = Capture(student, []) if teacher is not None and distiller is None else None
        self._teacher = None
        if teacher is not None:
            self._teacher = FrozenTeacher(teacher, prepare=prepare, shared=shared_modules(teacher, student))

    def guide(self) -> nn.Module | None:
        """The teacher, if there is one."""
        if self.distiller is not None:
            return self.distiller.teacher
        return self._teacher.model if self._teacher is not None else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Classification:
        if self._teacher is not None:
            self._teacher.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits (N, classes), and the distillation losses by name, weighted."""
        losses: dict[str, Tensor] = {}
        if self.distiller is not None:
            with self.distiller.capture(images) as captured:
                output = self._logits(self.distiller.student(images))
            losses["features"] = self.distiller.loss(captured)
        elif self._capture is not None:
            assert self._teacher is not None
            with self._capture() as captured:
                output = self._logits(self.student(images))
            self._teacher(captured)
        else:
            output = self._logits(self.student(images))
        if self.method.kd:
            loss = kd_loss(output, captured.teacher_output, self.distillation.kd_temperature)
            losses["kd"] = self.distillation.kd_weight * loss
        return output, losses

    def _logits(self, output: Any) -> Tensor:
        """The logits in the student's output."""
        if not isinstance(output, Tensor) and self.logits_at is None:
            self.logits_at = logits_place(output, self._num_classes)
        return output if isinstance(output, Tensor) else tensor_at(output, self.logits_at or ())

    def batch_losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy ("task") and the distillation losses."""
        images, labels = batch
        output, losses = self.losses(images)
        return {"task": F.cross_entropy(output, labels), **losses}

    def alone(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The first image, a batch (1, 3, H, W)."""
        return batch[0][:1]

    def described(
        self, batch: tuple[Tensor, Tensor], class_names: list[str]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """As of `Task`: "truth", "student" and "teacher", the latter two with the share that they give it."""
        images, labels = batch
        told = [{"truth": class_names[label]} for label in labels.tolist()]
        for role, network in (("student", self.network()), ("teacher", self.guide())):
            if network is not None:
                shares, found = network(images).float().softmax(1).max(1)
                for own, share, label in zip(told, shares.tolist(), found.tolist(), strict=True):
                    # A pre-trained teacher may know other classes.
                    name = class_names[label] if label < len(class_names) else f"class {label}"
                    own[role] = f"{name} ({share:.0%})"
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return list(images * deviation + mean), told

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """The images in the networks' memory format."""
        images, labels = batch
        return images.to(memory_format=self.memory_format), labels

    def _check_output(self, output: Tensor) -> None:
        """An optimiser step at the end of an epoch may spoil the weights that are about to be saved."""
        self.check_finite({"the student's output in evaluation mode": output.detach().float().abs().amax()})

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Where no validation follows the last step of an epoch, look here at what it did to the weights."""
        if self.trainer.is_last_batch and not self.validates():
            with torch.no_grad(), scratch(self.network()) as probe:
                self._check_output(probe.eval()(batch[0]))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the student's hits, and the first time the teacher's."""
        images, labels = batch
        output = self.network()(images)
        self.measure.update(output, labels)
        if self.trainer.state.fn == "fit":
            self._check_output(output)
        if (teacher := self.unmeasured_guide()) is not None:
            self.teacher_measure.update(teacher(images), labels)

    def results(self, computed: dict[str, Tensor]) -> dict[str, float]:
        """Shares of images."""
        return {name: float(value) for name, value in computed.items()}


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


def _accuracy(num_classes: int) -> MetricCollection:
    top = {"top1": MulticlassAccuracy(num_classes, 1, average="micro")}
    if num_classes > 5:
        top["top5"] = MulticlassAccuracy(num_classes, 5, average="micro")
    return MetricCollection(dict(top))

"""What trains a classifier: the loss on labels, and what its teacher teaches.

Axes: N batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from matchdistill.capture import Capture
from matchdistill.features import FeatureDistiller
from matchdistill.functional import kd_loss
from matchdistill.methods import KD
from matchdistill.probing import scratch
from matchdistill.runs.settings import Settings
from matchdistill.tasks.classification.judging import ClassJudge
from matchdistill.tasks.classification.labels import LabelLoss
from matchdistill.tasks.classification.logits import Place, logits_place, tensor_at
from matchdistill.tasks.classification.probe import body_in_evaluation_mode
from matchdistill.tasks.judging import Judge
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule
from matchdistill.teacher import FrozenTeacher, shared_modules

ACCURACIES = (
    Metric("top1", "top-1", of_images=True, hub_type="accuracy"),
    Metric("top5", "top-5", of_images=True),
)


class ClassificationModule(DistilledModule):
    """Trains a student on labels, and on its teacher's features (MGD or others), outputs (KD), both or neither.

    Args:
        student: images (N, 3, H, W) -> logits (N, num_classes).
        num_classes: number of classes.
        settings: of the run.
        teacher: the teacher of "kd" without features; with a distiller, its own is used.
        distiller: the distiller of the student, for methods with features.
        prepare: makes a copy of the teacher that runs faster, for "kd" without features.
        logits_at: where the student's output in training mode holds the logits, see `logits_place`; None: it is they, or
            this is found out at the first step.
        labels: of all training images (M,), for classes that weigh by them.
    """

    measured: ClassVar[tuple[Metric, ...]] = ACCURACIES

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        settings: Settings,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
        logits_at: Place | None = None,
        labels: Tensor | None = None,
    ) -> None:
        measures = [self.measure_of(num_classes), self.measure_of(num_classes)]
        super().__init__(student, settings, self.measured, measures, distiller)
        self._num_classes, self.logits_at, self.preparation = num_classes, logits_at, settings.student.prepared
        self.label_loss = self.loss_of(num_classes, labels)
        if self.schedule.frozen:
            body_in_evaluation_mode(student)
        self._kd_weight = settings.distillation.weight(KD)
        self._capture = Capture(student, []) if teacher is not None and distiller is None else None
        self._teacher = None
        if teacher is not None:
            self._teacher = FrozenTeacher(teacher, prepare=prepare, shared=shared_modules(teacher, student))

    @staticmethod
    def measure_of(num_classes: int) -> MetricCollection:
        """What computes the metrics of a network."""
        top = {"top1": MulticlassAccuracy(num_classes, 1, average="micro")}
        if num_classes > 5:
            top["top5"] = MulticlassAccuracy(num_classes, 5, average="micro")
        return MetricCollection(dict(top))

    def loss_of(self, num_classes: int, labels: Tensor | None) -> Any:
        """The loss on labels: (logits, targets) -> scalar, and ``mixed`` before it, as `LabelLoss` has them."""
        return LabelLoss(self.schedule, num_classes, labels)

    def kd(self, output: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """The loss of logits (N, classes) by the teacher's."""
        return kd_loss(output, taught, temperature)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, if there is one."""
        return super().teacher if self._teacher is None else self._teacher.model

    @property
    def frozen_teacher(self) -> FrozenTeacher | None:
        """What runs the teacher in training, if there is one."""
        return self._teacher if self.distiller is None else super().frozen_teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassificationModule:
        if self._teacher is not None:
            self._teacher.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> ClassificationModule:
        """Training or evaluation mode; a frozen body stays in evaluation mode."""
        super().train(mode)
        if mode and self.schedule.frozen:
            body_in_evaluation_mode(self.network())
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
            losses[KD] = self._kd_weight * self.kd(output, captured.teacher_output, self.distillation.kd_temperature)
        return output, losses

    def _logits(self, output: Any) -> Tensor:
        """The logits in the student's output."""
        if not isinstance(output, Tensor) and self.logits_at is None:
            self.logits_at = logits_place(output, self._num_classes)
        return output if isinstance(output, Tensor) else tensor_at(output, self.logits_at or ())

    def batch_losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The loss on labels ("task") and the distillation losses."""
        images, targets = self.label_loss.mixed(*batch)
        output, losses = self.losses(images)
        return losses if self.schedule.loss == "none" else {"task": self.label_loss(output, targets), **losses}

    def one_image(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The first image, a batch (1, 3, H, W)."""
        return batch[0][:1]

    def gallery(
        self, batch: tuple[Tensor, Tensor], class_names: list[str]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The images, and of each the names of "truth", "student" and "teacher", of networks with the share they give it."""
        images, labels = batch
        told = [{"truth": text} for text in self.true_names(labels, class_names)]
        for role, network in (("student", self.network()), ("teacher", self.teacher)):
            if network is not None:
                for own, text in zip(told, self.found_names(network(images).float(), class_names), strict=True):
                    own[role] = text
        return list(self.preparation.pixels(images)), told

    def judge(self, num_classes: int) -> Judge:
        """What looks at all validation images for the page."""
        return ClassJudge(num_classes)

    def true_names(self, labels: Tensor, class_names: list[str]) -> list[str]:
        """What labels say, in words."""
        return [class_names[label] for label in labels.tolist()]

    def found_names(self, logits: Tensor, class_names: list[str]) -> list[str]:
        """What logits (N, classes) say, in words."""
        shares, found = logits.softmax(1).max(1)
        # A pre-trained teacher may know other classes.
        names = [class_names[label] if label < len(class_names) else f"class {label}" for label in found.tolist()]
        return [f"{name} ({share:.0%})" for name, share in zip(names, shares.tolist(), strict=True)]

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

    def measure(self, measure: Any, network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Count a network's hits."""
        images, labels = batch
        output = network(images)
        measure.update(output, labels)
        if network is self.network() and self.trainer.state.fn == "fit":
            self._check_output(output)

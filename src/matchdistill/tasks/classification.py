"""Classification: cross-entropy, with the guidance of a teacher.

Axes: N batch.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from matchdistill.capture import Capture
from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller
from matchdistill.functional import kd_loss
from matchdistill.matching import Matching
from matchdistill.refresh import due, from_rank_0
from matchdistill.settings import Distillation, Training, parse_method
from matchdistill.teacher import FrozenTeacher
from matchdistill.trace import evaluating


class Classification(pl.LightningModule):
    """Trains a student on labels, and on its teacher's features (MGD or others), outputs (KD), both or neither.

    Args:
        student: images (N, 3, H, W) -> logits (N, num_classes).
        num_classes: number of classes.
        training: optimiser and schedule.
        distillation: how the teacher guides.
        teacher: the teacher of "kd" without features; with a distiller, its own is used.
        distiller: the distiller of the student, for methods with features.

    Attributes:
        memory_format: of the images, as of the networks' weights.
        refreshed: the matchings that this epoch began with; empty where it kept the ones before.
        result: the student's accuracies when they were last measured.
        teacher_result: the teacher's, once they were measured.
    """

    memory_format = torch.preserve_format

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        training: Training,
        distillation: Distillation,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
    ) -> None:
        super().__init__()
        self.distiller = distiller
        if distiller is None:
            self.student = student
        self.training_recipe, self.distillation = training, distillation
        self.method = parse_method(distillation.method)
        self._capture = Capture(student, []) if teacher is not None and distiller is None else None
        self._teacher = FrozenTeacher(teacher) if teacher is not None else None
        self.accuracy = _accuracy(num_classes, "val/")
        self.teacher_accuracy = _accuracy(num_classes, "val/teacher_")
        self.result: dict[str, float] = {}
        self.teacher_result: dict[str, float] = {}
        self.refreshed: list[Matching] = []
        self._unchecked: list[tuple[int, list[str], Tensor]] = []

    def network(self) -> nn.Module:
        """The student, the network to deploy."""
        return self.student if self.distiller is None else self.distiller.student

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits (N, classes), and the distillation losses by name, weighted."""
        losses: dict[str, Tensor] = {}
        if self.distiller is not None:
            with self.distiller.capture() as captured:
                output = _logits(self.distiller.student(images))
            losses["features"] = self.distiller.loss(captured)
        elif self._capture is not None:
            assert self._teacher is not None
            with self._capture() as captured:
                output = _logits(self.student(images))
            self._teacher(captured)
        else:
            output = _logits(self.student(images))
        if self.method.kd:
            loss = kd_loss(output, captured.teacher_output, self.distillation.kd_temperature)
            losses["kd"] = self.distillation.kd_weight * loss
        return output, losses

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """The images in the networks' memory format."""
        images, labels = batch
        return images.to(memory_format=self.memory_format), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The total loss of a batch."""
        images, labels = batch
        output, losses = self.losses(images)
        losses = {"task": F.cross_entropy(output, labels), **losses}
        total = torch.stack(list(losses.values())).sum()
        logged = {f"train/{name}": loss.detach() for name, loss in losses.items()}
        if self.distiller is not None:
            del logged["train/features"]
            logged |= {f"train/features_{number}": loss for number, loss in enumerate(self.distiller.position_losses)}
            self.log("train/features", losses["features"].detach(), on_step=False, on_epoch=True, prog_bar=True)
        self.log_dict(logged, on_step=True, on_epoch=True)
        self.log("train/loss", total.detach(), on_step=False, on_epoch=True, prog_bar=True)
        self._check_finite(logged)
        return total * self._weight(batch_idx)

    def _weight(self, batch_idx: int) -> float:
        """Lightning divides by `accumulate`; this makes up for it in the last step of an epoch, which may have less left."""
        every = self.training_recipe.accumulate
        if every == 1:
            return 1.0
        left = self.trainer.num_training_batches - batch_idx // every * every
        return every / min(every, left)

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        """Look at the losses of this step; on a GPU only now and then, as looking waits for it."""
        self._unchecked.append((self.global_step, list(losses), torch.stack(list(losses.values()))))
        if self.device.type == "cpu" or len(self._unchecked) >= 50:
            self._stop_if_not_finite()

    def _check_output(self, output: Tensor) -> None:
        """An optimiser step at the end of an epoch may spoil the weights that are about to be saved."""
        self._check_finite({"val/output": output.detach().float().abs().amax()})

    def _stop_if_not_finite(self) -> None:
        for step, names, values in self._unchecked:
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{self._described(name)} is {value} at step {step} (epoch {self.current_epoch}): training stops "
                        "and the checkpoint of the last whole epoch is kept. Lower the learning rate or the loss weight"
                    )
        self._unchecked.clear()

    def _described(self, name: str) -> str:
        if name == "val/output":
            return "the student's output in evaluation mode"
        prefix, _, number = name.rpartition("_")
        if prefix == "train/features" and self.distiller is not None:
            return f"the distillation loss of position {number} ({self.distiller.positions[int(number)].name})"
        return f"the loss {name.removeprefix('train/')!r}"

    def on_train_epoch_start(self) -> None:
        """Refresh the matching where it is due; log the mean cost of the matched pairs, and the churn from the second on."""
        # Lightning validates where this divides the number of the epoch, from 1.
        self.trainer.check_val_every_n_epoch = 1 if self.validates() else self.current_epoch + 2
        self.refreshed = []
        every = 0 if self.method.features == "random" else self.distillation.refresh_every
        if isinstance(self.distiller, MatchingDistiller) and due(self.current_epoch, every):
            self._take_buffers_of_rank_0()
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            images = data.refresh_dataloader(self.distillation.refresh_images, self.current_epoch)
            with self.trainer.precision_plugin.forward_context():
                self.refreshed = self.distiller.refresh(images, self.distillation.refresh_images)
        for number, matching in enumerate(self.refreshed):
            self.log(f"matching/cost_{number}", matching.mean_cost)
            if matching.churn is not None:
                self.log(f"matching/churn_{number}", matching.churn)

    def _take_buffers_of_rank_0(self) -> None:
        """Its running statistics, as at every step under DDP: since the last one each rank has had its own."""
        if self.trainer.world_size > 1:
            for buffer in self.network().buffers():
                buffer.copy_(from_rank_0(buffer))

    def validates(self) -> bool:
        """Whether this epoch ends with a validation: the last one does in any case."""
        epoch, recipe = self.current_epoch + 1, self.training_recipe
        return epoch == recipe.all_epochs or epoch % recipe.validate_every == 0

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Where no validation follows the last step of an epoch, look here at what it did to the weights."""
        if self.trainer.is_last_batch and not self.validates():
            network = self.network()
            with torch.no_grad(), evaluating(network):
                self._check_output(network(batch[0]))

    def on_train_epoch_end(self) -> None:
        """See that everything was finite before a checkpoint is written."""
        self._stop_if_not_finite()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the student's hits, and the first time the teacher's."""
        images, labels = batch
        output = self.network()(images)
        self.accuracy.update(output, labels)
        if self.trainer.state.fn == "fit":
            self._check_output(output)
        if (teacher := self.guide()) is not None and not self.teacher_result:
            self.teacher_accuracy.update(teacher(images), labels)

    def guide(self) -> nn.Module | None:
        """The teacher, if there is one."""
        if self.distiller is not None:
            return self.distiller.teacher
        return self._teacher.on(self.device).model if self._teacher is not None else None

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        computed = self.accuracy.compute()
        for name, value in computed.items():
            self.log(name, value, prog_bar=name == "val/top1")
        self.result = {name.removeprefix("val/"): float(value) for name, value in computed.items()}
        self.accuracy.reset()
        if self.guide() is not None and not self.teacher_result:
            computed = self.teacher_accuracy.compute()
            self.teacher_result = {name.removeprefix("val/teacher_"): float(value) for name, value in computed.items()}
            self.teacher_accuracy.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is not a weight."""
        checkpoint["results"] = [self.result, self.teacher_result]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what is not a weight."""
        self.result, self.teacher_result = checkpoint["results"]

    def configure_optimizers(self) -> Any:
        """SGD, its learning rate set at every step."""
        recipe = self.training_recipe
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches) // recipe.all_epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(recipe, step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lr_factor(recipe: Training, epoch: float) -> float:
    """The learning rate at a moment in epochs, warm-up included, relative to `recipe.lr`.

    Example:
        >>> [round(lr_factor(Training(warmup_epochs=10), epoch), 3) for epoch in (0, 5, 10, 40.9, 41, 91)]
        [0.1, 0.55, 1.0, 1.0, 0.1, 0.001]
    """
    if epoch < recipe.warmup_epochs:
        return 0.1 + 0.9 * epoch / recipe.warmup_epochs
    epoch -= recipe.warmup_epochs
    if recipe.schedule == "steps":
        return recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, epoch / recipe.epochs))
    return 1.0


def _logits(output: Any) -> Tensor:
    """The logits; in training GoogLeNet and Inception-V3 return those of their auxiliary classifiers behind them."""
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    return logits


def _accuracy(num_classes: int, prefix: str) -> MetricCollection:
    top = {"top1": MulticlassAccuracy(num_classes, 1, average="micro")}
    if num_classes > 5:
        top["top5"] = MulticlassAccuracy(num_classes, 5, average="micro")
    return MetricCollection(dict(top), prefix=prefix)

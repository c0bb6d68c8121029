"""What trains a network that gives every pixel a class: the loss on its labels, and what its teacher teaches.

Axes: N batch, C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from matchdistill.capture import Capture
from matchdistill.data.pixels import IGNORED, PADDED
from matchdistill.data.segmentation import Batch
from matchdistill.features import FeatureDistiller
from matchdistill.methods import KD
from matchdistill.probing import evaluating
from matchdistill.runs.settings import Settings
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.parted import PartModule
from matchdistill.tasks.picture import Picture
from matchdistill.tasks.segmentation.colours import colours, overlay
from matchdistill.tasks.segmentation.judging import PixelJudge
from matchdistill.tasks.segmentation.losses import dice_loss, pixel_cross_entropy, pixel_kd_loss
from matchdistill.tasks.segmentation.outputs import fitted, outputs_in, segment
from matchdistill.teacher import FrozenTeacher, shared_modules

MEAN_IOU = Metric("miou", "mIoU", hub_type="mean_iou")
PIXELS = (MEAN_IOU, Metric("pixel_accuracy", "pixel accuracy", hub_type="accuracy"))
OF_CLASS = "iou_"  # before a class's name in results
AUX_WEIGHT = 0.4  # of the loss of a second head, as H. Zhao et al. have it, "Pyramid Scene Parsing Network", CVPR 2017


class SegmentationModule(PartModule):
    """Trains a student on the classes of pixels, and on its teacher's features, outputs (KD by pixel), both or neither.

    Pixels that were padded or that the labels ignore count nowhere: in no loss, in no metric and not in the matching.

    Args:
        student: images (N, 3, H, W) -> logits, as `outputs_in` finds them.
        class_names: of the classes.
        settings: of the run.
        teacher: the whole teacher.
        distiller: of both networks or of their backbones, for methods with features; for "kd" too, of both networks.
        prepare: makes a copy of the teacher that runs faster, for "kd" without features.
    """

    def __init__(
        self,
        student: nn.Module,
        class_names: list[str],
        settings: Settings,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        measures = [pixel_measures(len(class_names)) for _ in range(2)]
        super().__init__(student, settings, PIXELS, measures, teacher, distiller)
        self.class_names, self.preparation = class_names, settings.student.prepared
        self._kd_weight = settings.distillation.weight(KD)
        weights = self.schedule.class_weights
        if isinstance(weights, list) and len(weights) != len(class_names):
            raise ValueError(
                f"training.class_weights has {len(weights)} numbers for {len(class_names)} classes: give one for each"
            )
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        self._capture, self._frozen = None, None
        if teacher is not None and distiller is None:
            self._capture = Capture(student, [])
            self._frozen = FrozenTeacher(teacher, prepare=prepare, shared=shared_modules(teacher, student))

    class_weights: Tensor | None

    def _apply(self, fn: Any, recurse: bool = True) -> SegmentationModule:
        if self._frozen is not None:
            self._frozen.apply(fn)
        super()._apply(fn, recurse)
        return self

    def batch_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss on labels ("task"), of a second head ("aux"), and the distillation losses."""
        images, labels = self._fitted(batch)
        size = (labels.shape[1], labels.shape[2])
        losses: dict[str, Tensor] = {}
        with self._watched(images) as captured:
            output = self.network()(images)
        if self.distiller is not None:
            losses["features"] = self.distiller.loss(captured, counted(labels))
        elif self._frozen is not None:
            self._frozen(captured)
        found = outputs_in(output).resized(size)
        if self.method.kd:
            taught = outputs_in(captured.teacher_output).resized(size).logits
            kd = pixel_kd_loss(found.logits, taught, labels, self.distillation.kd_temperature)
            losses[KD] = self._kd_weight * kd
        if self.schedule.loss != "none":
            losses = {"task": self.label_loss(found.logits, labels), **losses}
            if found.aux is not None:
                losses["aux"] = AUX_WEIGHT * self._cross_entropy(found.aux, labels)
        return losses

    def _fitted(self, batch: Batch) -> Batch:
        """A batch with padding where the networks do not take images of its size."""
        images, labels = batch
        networks = [network for network in (self.network(), self.teacher) if network is not None]
        padded = fitted(networks, images)
        rows, columns = (padded.shape[axis] - images.shape[axis] for axis in (2, 3))
        return padded, F.pad(labels, (0, columns, 0, rows), value=PADDED) if rows or columns else labels

    def _watched(self, images: Tensor) -> AbstractContextManager[Any]:
        """A block that runs the student on images, in which the distiller, or what runs the teacher, looks on."""
        if self.distiller is not None:
            # A part is watched as the student calls it: its input may be another.
            return self.distiller.capture() if self.part is not None else self.distiller.capture(images)
        return nullcontext() if self._capture is None else self._capture()

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (N, C, H, W) by labels (N, H, W), and Dice where the settings say so."""
        loss = self._cross_entropy(logits, labels)
        return loss + dice_loss(logits, labels) if self.schedule.loss == "ce+dice" else loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return pixel_cross_entropy(logits, labels, self.class_weights, self.schedule.label_smoothing)

    def run_part(self, batch: Batch) -> Tensor | None:
        """Run the student, all of it in evaluation mode; the pixels that count."""
        images, labels = self._fitted(self.transfer_batch_to_device(batch, self.device, 0))
        with evaluating(self.network()):
            self.network()(images.to(memory_format=self.memory_format))
        return counted(labels)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The images in the networks' memory format."""
        images, labels = batch
        return images.to(memory_format=self.memory_format), labels

    def one_image(self, batch: Batch) -> Tensor:
        """The first image, a batch (1, 3, H, W)."""
        return self._fitted((batch[0][:1], batch[1][:1]))[0]

    def gallery(self, batch: Batch, class_names: list[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The images, and of each "truth", "student" and "teacher" as pictures with the classes in colours."""
        whole, told = [], []
        for image, labels in alone(*batch):
            shown = self.preparation.pixels(image[0])
            found = {"truth": labels[0], "student": predicted(self.network(), image)[0]}
            if self.teacher is not None:
                found["teacher"] = predicted(self.teacher, image)[0]
            whole.append(shown)
            told.append({role: _picture(shown, each, labels[0], class_names) for role, each in found.items()})
        return whole, told

    def judge(self, num_classes: int) -> PixelJudge:
        """What looks at all validation images for the page."""
        return PixelJudge(num_classes, alone)

    def measure(self, measure: Any, network: nn.Module, batch: Batch) -> None:
        """Count a network's hits: of images of several sizes one by one, as padding would change what is found."""
        for images, labels in alone(*batch) if (batch[1] == PADDED).any() else [batch]:
            logits = segment(network, images).logits
            measure.update(logits.argmax(1), labels.clamp_min(IGNORED))
            if network is self.network() and self.trainer.state.fn == "fit":
                self.check_finite({"the student's output in evaluation mode": logits.detach().float().abs().amax()})

    def results(self, computed: dict[str, Tensor]) -> dict[str, float]:
        """mIoU, pixel accuracy, and the IoU of every class that the images or the network's output have."""
        found = {name: float(computed[name]) for name in ("miou", "pixel_accuracy")}
        each = computed["each"].tolist()
        return found | {f"{OF_CLASS}{name}": iou for name, iou in zip(self.class_names, each, strict=True) if iou >= 0}


def pixel_measures(num_classes: int) -> MetricCollection:
    """The metrics of labels (N, H, W), all of one confusion matrix of a row for each class."""
    options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORED, "validate_args": False}
    return MetricCollection(
        {
            "miou": MulticlassJaccardIndex(**options, zero_division=0.0),
            "each": MulticlassJaccardIndex(**options, average=None, zero_division=-1.0),
            "pixel_accuracy": MulticlassAccuracy(**options, average="micro"),
        }
    )


def counted(labels: Tensor) -> Tensor | None:
    """Which pixels of a batch count, neither padding nor ignored by their labels: bool (N, H, W); None where all do."""
    inside = labels >= 0
    return None if inside.all() else inside


def alone(images: Tensor, labels: Tensor) -> Iterator[Batch]:
    """The images of a batch one by one, (1, 3, H, W) and (1, H, W), without their padding."""
    for number in range(len(labels)):
        inside = labels[number] != PADDED
        rows, columns = (inside.any(1 - axis).nonzero().flatten() for axis in (0, 1))
        high, wide = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        yield images[number : number + 1, :, high, wide], labels[number : number + 1, high, wide]


def predicted(network: nn.Module, images: Tensor) -> Tensor:
    """The class (N, H, W) of every pixel of images (N, 3, H, W)."""
    return segment(network, images).logits.argmax(1)


def _picture(image: Tensor, found: Tensor, truth: Tensor, class_names: list[str]) -> Picture:
    """An image (3, H, W) with the classes (H, W) of its pixels, and their names, the most frequent ones first."""
    shown = found[truth >= 0]
    counts = shown[shown >= 0].bincount(minlength=len(class_names))
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    named = ", ".join(f"{class_names[label]} {int(counts[label]) / max(len(shown), 1):.0%}" for label in order)
    return Picture(overlay(image, found, colours(len(class_names))), named or "nothing")

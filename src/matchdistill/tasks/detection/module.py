"""What trains a detector: its own losses, and what its teacher's backbone teaches.

Axes: N batch, n boxes of an image, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics.detection import MeanAveragePrecision

from matchdistill.data.loading import BatchLoader
from matchdistill.features import FeatureDistiller
from matchdistill.matching import Matching
from matchdistill.runs.settings import Settings
from matchdistill.tasks.detection.judging import BoxJudge
from matchdistill.tasks.detection.parts import padded_batches, pixel_mask
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.parted import PartModule

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]  # images (3, H, W), targets: boxes (n, 4), labels (n,), ...

OF_TORCHMETRICS = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}  # names of metrics: torchmetrics' own
PRECISIONS = tuple(
    Metric(f"{prefix}{name}", f"{prefix}{name}".replace("ap", "AP").replace("_", " "))
    for prefix in ("", "mask_")
    for name in OF_TORCHMETRICS
)
SHOWN_SCORE = 0.3


class DetectionModule(PartModule):
    """Trains a detector on boxes (and masks), and on its teacher's backbone.

    The teacher's part is run on exactly the resized and padded batch that the student's was; its heads are run only to
    measure them. What was padded counts neither in the matching nor in the loss.

    Args:
        student: a detector in torchvision's API.
        masks: whether masks are measured too.
        settings: of the run.
        teacher: the whole teacher, to measure.
        distiller: the distiller of corresponding parts of student and teacher, for methods with features.
    """

    def __init__(
        self,
        student: nn.Module,
        masks: bool,
        settings: Settings,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
    ) -> None:
        measures = [average_precision(masks), average_precision(masks)]
        super().__init__(student, settings, PRECISIONS, measures, teacher, distiller)

    def batch_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The student's own losses, by torchvision's names, and that of the distiller."""
        images, targets = batch
        if self.distiller is None:
            return self._own_losses(images, targets)
        with padded_batches(self.student) as padded, self.distiller.capture() as captured:
            losses = self._own_losses(images, targets)
        return {**losses, "features": self.distiller.loss(captured, pixel_mask(padded[0]))}

    def _own_losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.student(images, targets)
        if not isinstance(losses, Mapping):
            raise ValueError(
                f"in training mode the student returns a {type(losses).__name__} for images and targets: expected a "
                "dictionary of losses, as torchvision's detectors return"
            )
        return dict(losses)

    def refresh(self, loader: BatchLoader) -> list[Matching]:
        """Solve the matching over a loader's images, resized as in training."""
        # The sizes are drawn; those of the steps must not depend on how many images were.
        with torch.random.fork_rng(devices=[]):
            return super().refresh(loader)

    def run_part(self, batch: Batch) -> Tensor | None:
        """Run the distilled part alone; the pixels that count."""
        assert self.distiller is not None
        images, _ = self.transfer_batch_to_device(batch, self.device, 0)
        padded, _ = self.student.get_submodule("transform")(images)
        self.distiller.student(padded.tensors)
        return pixel_mask(padded)

    def one_image(self, batch: Batch) -> list[Tensor]:
        """The first image, a list of one."""
        return batch[0][:1]

    def gallery(self, batch: Batch, class_names: list[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The images, and of each "truth", "student" and "teacher": [label, score or None, x0, y0, x1, y1] by box.

        Boxes are in shares of width and height; those of networks are the ones with a score of at least `SHOWN_SCORE`.
        """
        images, targets = batch
        found = {"truth": targets, "student": self.student(images)}
        if (teacher := self.teacher) is not None:
            found["teacher"] = teacher(images)
        told: list[dict[str, Any]] = [{} for _ in images]
        for role, each in found.items():
            for image, own, into in zip(images, each, told, strict=True):
                height, width = image.shape[1:]
                boxes = (own["boxes"] / own["boxes"].new_tensor([width, height, width, height])).tolist()
                scores = own["scores"].tolist() if "scores" in own else [None] * len(boxes)
                into[role] = [
                    [class_names[label - 1], score, *box]
                    for label, score, box in zip(own["labels"].tolist(), scores, boxes, strict=True)
                    if score is None or score >= SHOWN_SCORE
                ]
        return images, told

    def judge(self, num_classes: int) -> BoxJudge:
        """What looks at all validation images for the page."""
        return BoxJudge(num_classes, average_precision(masks=False, sync_on_compute=False), SHOWN_SCORE)

    def measure(self, measure: Any, network: nn.Module, batch: Batch) -> None:
        """Keep a network's detections."""
        images, targets = batch
        measure.update(detections(network(images)), targets)

    def results(self, computed: dict[str, Tensor]) -> dict[str, float]:
        """Average precisions from 0 to 1 by name, without sizes that no object has."""
        several = "segm_map" in computed
        found = {name: float(computed[f"bbox_{key}" if several else key]) for name, key in OF_TORCHMETRICS.items()}
        if several:
            found |= {f"mask_{name}": float(computed[f"segm_{key}"]) for name, key in OF_TORCHMETRICS.items()}
        return {name: value for name, value in found.items() if value >= 0}


class AveragePrecision(MeanAveragePrecision):
    """Takes processes with different numbers of images: torchmetrics gathers theirs one by one, and waits for more."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for name in self._defaults:
            shares: list[Any] = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(shares, tree_map_only(Tensor, Tensor.cpu, getattr(self, name)), process_group)
            setattr(self, name, [image for share in shares for image in share])


def average_precision(masks: bool, sync_on_compute: bool = True) -> AveragePrecision:
    """COCO's average precision of boxes, and of masks, over the processes or, without `sync_on_compute`, of this one.

    Raises:
        ValueError: no package that computes it.
    """
    backends: tuple[Literal["faster_coco_eval"], Literal["pycocotools"]] = ("faster_coco_eval", "pycocotools")
    backend = next((name for name in backends if importlib.util.find_spec(name)), None)
    if backend is None:
        raise ValueError(
            "detectors are measured by faster-coco-eval or pycocotools: pip install 'matchdistill[detection]'"
        )
    types: Any = ("bbox", "segm") if masks else "bbox"
    metric = AveragePrecision(iou_type=types, backend=backend, sync_on_compute=sync_on_compute)
    metric.warn_on_many_detections = False  # of more than 100 in an image the best 100 count, as COCO has it
    return metric


def detections(output: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """A detector's output as the metric takes it: in 32 bits, masks (n, H, W) of yes and no."""
    found = []
    for image in output:
        own = {"boxes": image["boxes"].float(), "scores": image["scores"].float(), "labels": image["labels"]}
        if "masks" in image:
            own["masks"] = image["masks"][:, 0] > 0.5
        found.append(own)
    return found

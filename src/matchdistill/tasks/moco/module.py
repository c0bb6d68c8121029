"""What trains an encoder by momentum contrast, and on its teacher's features.

Axes: N images of this process, M images of all processes, D embedding, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from matchdistill.data.crops import CropData
from matchdistill.data.loading import mix_seed
from matchdistill.features import FeatureDistiller
from matchdistill.probing import copy_of_model, scratch
from matchdistill.runs.settings import Settings
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.moco.contrast import (
    drawn_order,
    enqueue,
    follow,
    info_nce,
    new_queue,
    put_back,
    share_of,
    shuffled,
)
from matchdistill.tasks.moco.objective import Contrast
from matchdistill.tasks.neighbours import BY_LABELS, SeparatingModule, Separation

INFO_NCE = Metric("info_nce", "InfoNCE", higher_is_better=False, share=False)


class Encoder(nn.Module):
    """A body with a head, whose output has length 1.

    Args:
        body: images (N, 3, H, W) -> pooled features.
        head: pooled features -> embedding (N, D).
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> embedding (N, D), in 32 bits."""
        return embedding(self.head, self.body(images))


def new_head(width: int, dimensions: int) -> nn.Sequential:
    """The head of MoCo-v2: width -> width -> D."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions))


def embedding(head: nn.Module, pooled: Tensor) -> Tensor:
    """What a head makes of pooled features, with length 1 (N, D)."""
    return F.normalize(head(pooled).float(), dim=1)


class MocoModule(SeparatingModule):
    """Trains a student without labels: its embedding of one crop is to be told, among others, from that of another crop.

    The student is the body of the query encoder; the key encoder follows both it and its head. Teacher and student
    see the same query crops.

    Args:
        student: images (N, 3, H, W) -> pooled features (N, width).
        width: of the pooled features.
        settings: of the run.
        data: what it is trained on.
        teacher: the body of the teacher, to measure.
        distiller: of both, for methods with features.

    Attributes:
        head: of the query encoder.
        keys: the key encoder.
        queue: keys of earlier images (K, D).
        place: where the oldest of them is.
    """

    task_loss = "InfoNCE loss"

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        student: nn.Module,
        width: int,
        settings: Settings,
        data: CropData,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
    ) -> None:
        self.labelled = data.labelled
        alone = MetricCollection({INFO_NCE.name: MeanMetric()})
        measures = [Separation(), Separation()] if self.labelled else [alone]
        super().__init__(student, settings, BY_LABELS if self.labelled else [INFO_NCE], measures, distiller)
        self.contrast: Contrast = settings.objective
        self.data, self.seed, self._teacher = data, settings.seed, (teacher,)  # in a tuple: not saved with the student
        if not self.labelled:
            self.measured_with = ("head.", "keys.", "queue")
        self.head = new_head(width, self.contrast.dimensions)
        self.keys = Encoder(copy_of_model(student), copy_of_model(self.head)).requires_grad_(False)
        self.register_buffer("queue", new_queue(self.contrast.queue, self.contrast.dimensions))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @property
    def teacher(self) -> nn.Module | None:
        """The body of the teacher, if there is one."""
        return self._teacher[0]

    @property
    def averaged(self) -> dict[str, nn.Module]:
        """The query encoder: the student, and its head."""
        return {**super().averaged, "head": self.head}

    def _apply(self, fn: Any, recurse: bool = True) -> MocoModule:
        if self.teacher is not None and self.distiller is None:
            self.teacher._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def check_processes(self, world: int) -> None:
        """Raise a ValueError unless the queue takes whole batches."""
        batch = world * self.data.options.batch_size
        if self.contrast.queue % batch:
            each = f"data.batch_size {self.data.options.batch_size}" + (f" on {world} processes" if world > 1 else "")
            more = -(-self.contrast.queue // batch) * batch
            raise ValueError(
                f"objective.queue is {self.contrast.queue}: expected a multiple of the {batch} keys of a step ({each}), "
                f"such as {more}"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the key encoder follow before each step of the optimiser."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.schedule.accumulate == 0:
            followers = [*self.keys.body.parameters(), *self.keys.head.parameters()]
            follow(followers, [*self.network().parameters(), *self.head.parameters()], self.contrast.momentum)

    def batch_losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """InfoNCE ("task"), and the loss of the distiller."""
        query_crops, key_crops = (crops.to(memory_format=self.memory_format) for crops in batch[0].unbind(1))
        losses: dict[str, Tensor] = {}
        if self.distiller is None:
            pooled = self.network()(query_crops)
        else:
            with self.distiller.capture(query_crops) as captured:
                pooled = self.network()(query_crops)
            losses["features"] = self.distiller.loss(captured)
        queries = embedding(self.head, pooled)
        keys = self.keys_of_all(key_crops)
        with torch.autocast(self.device.type, enabled=False):
            task = info_nce(queries, share_of(keys), self.queue.clone(), self.contrast.temperature)
        enqueue(self.queue, self.place, keys)
        return {"task": task, **losses}

    @torch.no_grad()
    def keys_of_all(self, crops: Tensor) -> Tensor:
        """The keys (M, D) of all processes' crops, of which this process has (N, 3, H, W).

        They are shuffled among the processes: else batch norm would let an image be told by the statistics that it shares
        with its key.
        """
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        world = self.trainer.world_size
        order = drawn_order(world * len(crops), mix_seed("shuffle", self.seed, step), crops.device)
        return put_back(self.keys(shuffled(crops, order)), order)

    def pooled(self, network: nn.Module, images: Tensor) -> Tensor:
        """The pooled output (N, width) of the student or the teacher, for images (N, 3, H, W)."""
        output: Tensor = network(images)
        return output.float()

    def measure(self, measure: Any, network: nn.Module, batch: tuple[Tensor, ...]) -> None:
        """Take the pooled features of labelled images; else InfoNCE of held-out ones among the keys in the queue."""
        if self.labelled:
            images, labels = batch
            self.measure_neighbours(measure, network, images, labels)
            return
        query_crops, key_crops = batch[2].unbind(1)
        pooled = network(query_crops)
        queries, keys = embedding(self.head, pooled), self.keys(key_crops)
        with torch.autocast(self.device.type, enabled=False):
            loss = info_nce(queries, keys, self.queue, self.contrast.temperature)
        measure.update(loss, weight=len(queries))
        if self.trainer.state.fn == "fit":
            self.check_output(pooled)

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Where no validation follows the last step of an epoch, look here at what it did to the weights."""
        if self.trainer.is_last_batch and not self.validates():
            with torch.no_grad(), scratch(self.network()) as probe:
                self.check_output(probe.eval()(batch[0][:, 0]))

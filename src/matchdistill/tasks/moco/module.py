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
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.moco.contrast import drawn_order, enqueue, follow, info_nce, new_queue, put_back, share_of, shuffled
from matchdistill.tasks.moco.objective import Contrast

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


class MocoModule(DistilledModule):
    """Trains a student without labels: its embedding of one crop is to be told, among others, from that of another crop.

    The student is the body of the query encoder; the key encoder follows both it and its head. Teacher and student
    see the same query crops.

    Args:
        student: images (N, 3, H, W) -> pooled features (N, width).
        width: of the pooled features.
        settings: of the run.
        data: what it is trained on.
        distiller: of the student, for methods with features.

    Attributes:
        head: of the query encoder.
        keys: the key encoder.
        queue: keys of earlier images (K, D).
        place: where the oldest of them is.
    """

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        student: nn.Module,
        width: int,
        settings: Settings,
        data: CropData,
        distiller: FeatureDistiller | None = None,
    ) -> None:
        super().__init__(student, settings, [INFO_NCE], [MetricCollection({INFO_NCE.name: MeanMetric()})], distiller)
        self.contrast: Contrast = settings.objective
        self.data, self.seed = data, settings.seed
        self.head = new_head(width, self.contrast.dimensions)
        self.keys = Encoder(copy_of_model(student), copy_of_model(self.head)).requires_grad_(False)
        self.register_buffer("queue", new_queue(self.contrast.queue, self.contrast.dimensions))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def check_processes(self, world: int) -> None:
        """Raise a ValueError unless the queue takes whole batches."""
        batch = world * self.data.options.batch_size
        if self.contrast.queue % batch:
            each = f"data.batch_size {self.data.options.batch_size}" + (f" on {world} processes" if world > 1 else "")
            more = -(-self.contrast.queue // batch) * batch
            raise ValueError(
                f"objective.queue is {self.contrast.queue}: expected a multiple of the {batch} keys of a step ({each}), such as "
                f"{more}"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the key encoder follow before each step of the optimiser."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.schedule.accumulate == 0:
            followers = [*self.keys.body.parameters(), *self.keys.head.parameters()]
            follow(followers, [*self.network().parameters(), *self.head.parameters()], self.contrast.momentum)

    def batch_losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """InfoNCE ("task"), and the loss of the distiller."""
        query_crops, key_crops = batch[0].unbind(1)
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

    def measure(self, measure: Any, network: nn.Module, batch: tuple[Tensor, ...]) -> None:
        """InfoNCE of held-out images, whose crops are told from the keys in the queue."""
        query_crops, key_crops = batch[2].unbind(1)
        queries, keys = embedding(self.head, network(query_crops)), self.keys(key_crops)
        with torch.autocast(self.device.type, enabled=False):
            loss = info_nce(queries, keys, self.queue, self.contrast.temperature)
        measure.update(loss, weight=len(queries))

    def unmeasured_teacher(self) -> nn.Module | None:
        """None where there are no labels: the teacher has no head that makes keys."""
        return super().unmeasured_teacher() if self.data.labelled else None

    def one_image(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The first image, a batch (1, 3, H, W)."""
        return batch[0][:1]

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Any:
        """The images in the networks' memory format."""
        return tuple(value.to(memory_format=self.memory_format) if value.ndim == 4 else value for value in batch)

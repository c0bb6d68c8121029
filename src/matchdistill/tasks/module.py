"""What the modules of all tasks have in common: a student that is trained, taught, watched and measured."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric as Measure
from torchmetrics import MetricCollection

from matchdistill.cache import TeacherCache
from matchdistill.capture import Captured
from matchdistill.data.loading import BatchLoader, Viewed, first_of_view
from matchdistill.distiller import MatchingDistiller
from matchdistill.distributed import rank_and_world, take_from_rank_0
from matchdistill.features import FeatureDistiller
from matchdistill.matching import Matching, logged
from matchdistill.refresh import due, due_at_step
from matchdistill.runs.settings import Settings
from matchdistill.tasks.judging import Judge
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.optimizing import Plateau, build_optimizer, is_transformer, lr_factor, warmup_factor
from matchdistill.teacher import FrozenTeacher


class DistilledModule(pl.LightningModule):
    """Trains a student on its task's losses, and on its teacher's features where there is a distiller.

    Args:
        student: the network to train.
        settings: of the run.
        metrics: what is measured; the first one is shown while training.
        measures: what computes it, for the student and for the teacher; empty: nothing does.
        distiller: the distiller of the student, or of a part of it, for methods with features.

    Attributes:
        schedule: how the student is trained, with what its family chooses where nothing is given.
        memory_format: of the networks' weights.
        refreshed: the matchings of the last refresh in this epoch, or at the end of the one before; empty where it kept the
            ones before.
        moment: "step" and "epoch" that the last refresh came before, and the "seconds" that it took; 0 for one by the steps'
            own features.
        result: the student's metrics by name when they were last measured.
        teacher_result: the teacher's, once they were measured.
        cache: of the teacher's features, which images in fixed views have; None: the teacher runs in every step.
        task_loss: what the loss called "task" is called for people.
        measured_with: prefixes of what, in its state beside the student, the student is measured with.
    """

    memory_format = torch.preserve_format
    cache: TeacherCache | None = None
    measured_with: tuple[str, ...] = ()
    task_loss = "loss on labels"

    def __init__(
        self,
        student: nn.Module,
        settings: Settings,
        metrics: Sequence[Metric],
        measures: Sequence[Measure | MetricCollection],
        distiller: FeatureDistiller | None,
    ) -> None:
        super().__init__()
        self.distiller = distiller
        if distiller is None or distiller.student is not student:
            self.student = student
        self.schedule = settings.training.settled(is_transformer(student))
        self.distillation = settings.distillation
        self.method = self.distillation.parsed
        self.metrics = tuple(metrics)
        self.measures = nn.ModuleList(measures)
        self.result: dict[str, float] = {}
        self.teacher_result: dict[str, float] = {}
        self.refreshed: list[Matching] = []
        self.moment: dict[str, Any] = {}
        self._plateau: Plateau | None = None
        self._plateau_state: dict[str, Any] = {}
        self._unchecked: list[tuple[int, list[str], Tensor]] = []
        self._numbers: Tensor | None = None

    def network(self) -> nn.Module:
        """The student, the network to deploy."""
        if self.distiller is None or hasattr(self, "student"):
            return self.student
        return self.distiller.student

    @property
    def averaged(self) -> dict[str, nn.Module]:
        """What a moving average of the weights is of, by name: the student, and what it is measured with and trained."""
        return {"student": self.network()}

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, if there is one."""
        return None if self.distiller is None else self.distiller.teacher

    @property
    def frozen_teacher(self) -> FrozenTeacher | None:
        """What runs the teacher in training, if there is one."""
        return None if self.distiller is None else self.distiller.frozen_teacher

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn from; else the student is measured as it was given."""
        return True

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a training batch by name, weighted; that of the distiller is called "features"."""
        raise NotImplementedError

    def check_processes(self, world: int) -> None:
        """Raise a ValueError unless so many processes can train it."""

    def one_image(self, batch: Any) -> Any:
        """What a network is called with for the first image of a batch."""
        raise NotImplementedError

    def gallery(self, batch: Any, class_names: list[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The images of a batch (3, H, W) in 0..1, and for each what it shows, and what student and teacher find.

        Each of "truth", "student" and "teacher" is words, or boxes [name, score or None, x0, y0, x1, y1] in shares of width
        and height, or a `Picture` that the task draws. Both networks are in evaluation mode.
        """
        return [], []

    def judge(self, num_classes: int) -> Judge | None:
        """What looks at all validation images for the page, anew for each network; None: there is nothing to judge.

        Args:
            num_classes: how many the data has, without any background.
        """
        return None

    def results(self, computed: dict[str, Tensor]) -> dict[str, float]:
        """What the computed metrics are called in `result`."""
        return {name: float(value) for name, value in computed.items()}

    # Runs the distilled part of the student alone on a batch, as `MatchingDistiller.refresh` takes it; None: the student is
    # run on the batch's images.
    run_part: Callable[[Any], Tensor | None] | None = None

    def refresh(self, loader: BatchLoader) -> list[Matching]:
        """Solve the matching over a loader's images."""
        assert isinstance(self.distiller, MatchingDistiller)
        settings = self.distillation
        return self.distiller.refresh(
            loader if self.cache is None else self.cache.over(loader),
            settings.refresh_images,
            forward=self.run_part,
            tolerance=settings.refresh_tolerance,
        )

    def on_fit_start(self) -> None:
        """Make room for the teacher's features, rank 0 first."""
        if self.cache is None or self.frozen_teacher is None:
            return
        for first in (True, False):
            if self.trainer.is_global_zero is first:
                self.cache.open()
            self.trainer.strategy.barrier()
        self.frozen_teacher.cache = self.cache

    def on_fit_end(self) -> None:
        """Let other runs have the room of the features."""
        if self.cache is not None and self.frozen_teacher is not None:
            self.frozen_teacher.cache = None
            self.cache.close()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """A batch without the numbers of fixed views, which `training_step` takes the teacher's features by."""
        batch, self._numbers = batch if isinstance(batch, Viewed) else (batch, None)
        return batch

    def _fill_cache(self) -> None:
        """Run the teacher on the images that the epoch left out, as they made no whole batch, if their views come again."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.cache is None or not self.current_epoch < min(data.views, self.schedule.all_epochs - data.views):
            return
        self.trainer.strategy.barrier()  # what the other processes have run is there
        (rank, world), images = rank_and_world(), len(data.train_set)
        first = first_of_view(self.current_epoch, data.views, images)
        loader = data.views_dataloader(self.cache.empty(range(first + rank, first + images, world)))
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in self.cache.over(loader):
                moved = self.on_after_batch_transfer(self.transfer_batch_to_device(batch, self.device, 0), 0)
                assert self.frozen_teacher is not None
                self.frozen_teacher(Captured(arguments=((moved[0],), {})))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total loss of a batch."""
        with contextlib.nullcontext() if self.cache is None else self.cache.of(self._numbers):
            losses = self.batch_losses(batch)
        total = torch.stack(list(losses.values())).sum()
        values = {f"train/{name}": loss.detach() for name, loss in losses.items()}
        options: dict[str, Any] = {"on_epoch": True, "batch_size": len(batch[0])}
        if self.distiller is not None:
            del values["train/features"]
            values |= {f"train/features_{number}": loss for number, loss in enumerate(self.distiller.position_losses)}
            self.log("train/features", losses["features"].detach(), on_step=False, prog_bar=True, **options)
        self.log_dict(values, on_step=True, **options)
        self.log("train/loss", total.detach(), on_step=False, prog_bar=True, **options)
        self.check_finite(values)
        return total * self._weight(batch_idx)

    def _weight(self, batch_idx: int) -> float:
        """Lightning divides by `accumulate`; this makes up for it in the last step of an epoch, which may have less left."""
        every = self.schedule.accumulate
        if every == 1:
            return 1.0
        left = self.trainer.num_training_batches - batch_idx // every * every
        return every / min(every, left)

    def check_finite(self, values: dict[str, Tensor]) -> None:
        """Look at values of this step; on a GPU only now and then, as looking waits for it.

        Args:
            values: scalars by what they are: "train/" and the name of a loss, or any words.
        """
        self._unchecked.append((self.global_step, list(values), torch.stack(list(values.values()))))
        if self.device.type == "cpu" or len(self._unchecked) >= 50:
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        for step, names, values in self._unchecked:
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{self._in_words(name)} is {value} at step {step} (epoch {self.current_epoch}): training stops "
                        "and the checkpoint of the last whole epoch is kept. Lower the learning rate or the loss weight"
                    )
        self._unchecked.clear()

    def _in_words(self, name: str) -> str:
        prefix, _, number = name.rpartition("_")
        if prefix == "train/features" and self.distiller is not None:
            return f"the distillation loss of position {number} ({self.distiller.positions[int(number)].name})"
        return f"the loss {name.removeprefix('train/')!r}" if name.startswith("train/") else name

    def on_train_epoch_start(self) -> None:
        """Refresh the matching where it is due by epochs."""
        # Lightning validates where this divides the number of the epoch, from 1.
        self.trainer.check_val_every_n_epoch = 1 if self.validates() else self.current_epoch + 2
        if self._online():
            assert isinstance(self.distiller, MatchingDistiller)
            self.distiller.forget()  # so that a resumed run adds up the same steps
            self.distiller.online = self.distillation.refresh_online if self._ends_with_refresh() else 0
            if self.current_epoch:
                return
        self.refreshed = []
        if self._due(self.current_epoch):
            self._refresh(self.current_epoch)

    def _due(self, epoch: int) -> bool:
        return self.distillation.refresh_steps is None and due(epoch, self.refresh_every() if self._refreshes() else 0)

    def refresh_every(self) -> int | list[int]:
        """Epochs between refreshes of the matching, or the epochs themselves."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.distillation.epochs_between(len(data.train_set))

    def _refreshes(self) -> bool:
        """Whether the matching is solved anew in training."""
        return self.method.family is not None and self.method.family.refreshes

    def _ends_with_refresh(self) -> bool:
        """Whether an online refresh is due between this epoch and the next one."""
        following = self.current_epoch + 1
        return following < self.schedule.all_epochs and self._due(following)

    def _online(self) -> bool:
        """Whether the steps of an epoch give the matching of the next one."""
        return self.distillation.refresh_online > 0 and isinstance(self.distiller, MatchingDistiller)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refresh the matching where it is due by steps of the optimiser."""
        phases = self.distillation.refresh_steps
        if phases is None or batch_idx % self.schedule.accumulate:
            return
        if due_at_step(self.global_step, phases if self._refreshes() else [[0, 0]]):
            self._refresh(self.global_step)

    def _refresh(self, number: int) -> None:
        """Log the mean cost of the matched pairs, and the churn from the second refresh on."""
        if not isinstance(self.distiller, MatchingDistiller):
            return
        self._take_buffers_of_rank_0()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        started = time.monotonic()
        with self.trainer.precision_plugin.forward_context():
            self.refreshed = self.refresh(data.refresh_dataloader(self.distillation.refresh_images, number))
        seconds = time.monotonic() - started
        self.moment = {"step": self.global_step, "epoch": self.current_epoch, "seconds": seconds}
        self.log_dict(logged(self.refreshed))

    def _take_buffers_of_rank_0(self) -> None:
        """Its running statistics, as at every step under DDP: since the last one each rank has had its own."""
        take_from_rank_0(self.network().buffers())

    def validates(self) -> bool:
        """Whether this epoch ends with a validation: the last one does in any case."""
        epoch, schedule = self.current_epoch + 1, self.schedule
        return epoch == schedule.all_epochs or epoch % schedule.validate_every == 0

    def on_train_epoch_end(self) -> None:
        """See that everything was finite, and do what follows from the epoch, before a checkpoint is written."""
        self._stop_if_not_finite()
        self._fill_cache()
        if self._plateau is not None and self.validates():
            self._plateau.step(self.result[self.metrics[0].name])
        if self._online():
            assert isinstance(self.distiller, MatchingDistiller)
            self.refreshed = self.distiller.refresh() if self._ends_with_refresh() else []
            self.moment = {"step": self.global_step, "epoch": self.current_epoch + 1, "seconds": 0.0}
            self.log_dict(logged(self.refreshed))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the student, and the first time the teacher."""
        for measure, network in zip(self.measures, (self.network(), self.unmeasured_teacher()), strict=False):
            if network is not None:
                self.measure(measure, network, batch)

    def measure(self, measure: nn.Module, network: nn.Module, batch: Any) -> None:
        """Add what a network makes of a validation batch, both in evaluation mode, to a measure."""
        raise NotImplementedError

    def unmeasured_teacher(self) -> nn.Module | None:
        """The teacher, as long as it has not been measured."""
        return None if self.teacher_result else self.teacher

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        if not self.measures:
            return
        self.result = self._computed(self.measures[0], "student")
        for name, value in self.result.items():
            self.log(f"val/{name}", value, prog_bar=name == self.metrics[0].name)
        if self.unmeasured_teacher() is not None:
            self.teacher_result = self._computed(self.measures[1], "teacher")

    def _computed(self, measure: Any, role: str) -> dict[str, float]:
        result = self.results(measure.compute())
        measure.reset()
        for metric in self.metrics:
            if not math.isfinite(value := result.get(metric.name, 0.0)):  # it could not be read again from metrics.json
                raise FloatingPointError(
                    f"{metric.label} of the {role} is {value} on the validation images: either nothing in them is labelled "
                    f"so that it can be measured, or the outputs of the {role} are not finite"
                )
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is not a weight."""
        checkpoint["results"] = [self.result, self.teacher_result]
        if self._plateau is not None:
            checkpoint["plateau"] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what is not a weight."""
        self.result, self.teacher_result = checkpoint["results"]
        self._plateau_state = checkpoint.get("plateau", {})  # the optimiser is built later

    def configure_optimizers(self) -> Any:
        """The optimiser, its learning rate set at every step."""
        schedule = self.schedule
        optimizer = build_optimizer(self, self.network(), schedule)
        steps = max(1, int(self.trainer.estimated_stepping_batches) // schedule.all_epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(schedule, step / steps) * warmup_factor(schedule, step)
        )
        if schedule.schedule == "plateau":
            self._plateau = Plateau(scheduler, schedule, self.metrics[0].higher_is_better)
            if self._plateau_state:
                self._plateau.load_state_dict(self._plateau_state)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

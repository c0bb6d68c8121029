"""Ultralytics: its own trainers, which distil a teacher into the YOLO that they train.

Axes: N images, H height, W width.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from matchdistill.capture import Captured
from matchdistill.data.loading import mix_seed
from matchdistill.distiller import MatchingDistiller
from matchdistill.distributed import rank_and_world, take_from_rank_0
from matchdistill.integrations.optimizers import group_of_scales, positions_of
from matchdistill.integrations.yolo import PLACES, found_taps, head_of, without_head
from matchdistill.models.preparation import Preparation, convert_images
from matchdistill.options import MatchingOptions
from matchdistill.probing import OwnHook, copy_of_model, random_state, remove_own_hooks
from matchdistill.refresh import check_refreshes, due
from matchdistill.taps import Tap, unwrapped
from matchdistill.trace import tensors_in

try:
    from ultralytics import RTDETR, YOLO
    from ultralytics.engine.model import Model
    from ultralytics.nn.modules import RTDETRDecoder
    from ultralytics.nn.tasks import RTDETRDetectionModel
    from ultralytics.utils import DEFAULT_CFG, LOGGER
except ImportError as error:
    raise ImportError(
        "matchdistill.integrations.ultralytics needs Ultralytics: pip install 'matchdistill[ultralytics]'"
    ) from error

COLUMN = "mgd_loss"  # beside box_loss and the others
STATE = "matchdistill"  # in the optimiser's part of a checkpoint
LOSS_WEIGHT = 1.0  # not tuned: 5, the default elsewhere, is chosen for the losses of classifiers
# What Ultralytics' trainers give: RGB from 0 to 1.
UNCHANGED = Preparation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def distilling(
    teacher: str | Path | nn.Module,
    *,
    base: type[Any] | None = None,
    refresh_every: int | Sequence[int] = 1,
    max_images: int = 20_000,
    taps: str | Sequence[tuple[Tap | str, Tap | str]] = "auto",
    **options: Any,
) -> Callable[..., Any]:
    """A trainer for `YOLO.train` that distils a teacher: ``YOLO("yolo11n.yaml").train(trainer=distilling("yolo11s.pt"))``.

    Data, augmentation, losses, moving average, validation, mixed precision, DDP, checkpoints and resuming are Ultralytics'
    own. The loss of each training step has one part more, shown as ``mgd_loss``; the teacher sees exactly the student's
    batch, and its classes may be others. The saved files hold a plain model of Ultralytics. Until the training ends,
    ``last.pt`` also has matching, margins and the student-side normalisation: resume with the same `distilling`.

    Args:
        teacher: the trained network: the file of a model of Ultralytics, a `YOLO`, or any network. It is copied. A network
            of timm gets its own normalisation; any other one gets images (N, 3, H, W) of values from 0 to 1. Ultralytics
            reads a file ``.pt`` and can run code that is in it: give only files that you trust.
        base: the trainer to extend; None: Ultralytics' for the task of a YOLO. Give yours, or the one of another class of
            models: ``RTDETRTrainer``, ``WorldTrainer``.
        refresh_every: epochs from one refresh of the matching to the next, 0 for a single one before training, or the
            epochs (from 0) themselves.
        max_images: the most training images of a refresh, over all processes.
        taps: "backbone": as `find_taps` finds them; "neck": what goes into the heads; "auto": both, the neck where both
            networks have one; or pairs (teacher tap, student tap) such as ``("model.4", "model.4")``.
        options: further fields of `MatchingOptions`, such as ``reduction``. ``loss_weight`` is 1 by default.

    Returns:
        What makes the trainer, for ``trainer=``. While it trains, its attribute ``distiller`` is the distiller.

    Raises:
        TypeError: an unknown option, or what is no teacher.
        ValueError: an option out of range. At the start of training: networks or taps that `MatchingDistiller` refuses, a
            way of training that it is not for, or a checkpoint to resume from without a matching.
    """
    if not isinstance(teacher, str | Path | nn.Module):
        raise TypeError(f"the teacher is a {type(teacher).__name__}: expected a file, a YOLO or a torch.nn.Module")
    if isinstance(taps, str) and taps not in PLACES:
        raise ValueError(f"taps={taps!r}: expected {', '.join(map(repr, PLACES))} or pairs (teacher tap, student tap)")
    if options.get("online"):
        raise ValueError("online: the trainer matches over the images of a loader, leave it out")
    if base is not None and not isinstance(base, type):
        raise TypeError(f"base is {base!r}: expected a class of trainers, such as DetectionTrainer")
    if not isinstance(taps, str) and (not taps or any(isinstance(pair, str) or len(pair) != 2 for pair in taps)):
        raise ValueError(f"taps={taps!r}: expected {', '.join(map(repr, PLACES))} or pairs (teacher tap, student tap)")
    check_refreshes(refresh_every, max_images)
    options = {"loss_weight": LOSS_WEIGHT, **options}
    MatchingOptions.of(taps="auto" if isinstance(taps, str) else taps, **options)
    settings = Distillation(teacher, refresh_every, max_images, taps, options)

    def trainer(cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> Any:
        own = base or YOLO.task_map.fget(None)[(overrides or {}).get("task") or "detect"]["trainer"]
        made = type(f"Distilling{own.__name__}", (DistillingTrainer, own), {"settings": settings})
        return made(cfg, overrides, _callbacks)

    return trainer


@dataclass(frozen=True)
class Distillation:
    """What `distilling` was given. Ultralytics sends it to the processes of DDP along with the trainer's class."""

    teacher: str | Path | nn.Module
    refresh_every: int | Sequence[int]
    max_images: int
    taps: str | Sequence[tuple[Tap | str, Tap | str]]
    options: dict[str, Any]


class DistillingTrainer:
    """What `distilling` puts before a trainer of Ultralytics.

    Attributes:
        distiller: the distiller, while it trains.
    """

    settings: Distillation
    # What it takes from the trainer behind it.
    args: Any
    data: dict[str, Any]
    device: torch.device
    amp: bool
    epoch: int
    epochs: int
    train_loader: DataLoader[Any]

    distiller: MatchingDistiller | None = None
    _step: _Step | None = None
    _dataset: Any = None
    _average: Any = None

    @property
    def ema(self) -> Any:
        """The moving average: a copy of the model, without the hooks of the distiller."""
        return self._average

    @ema.setter
    def ema(self, average: Any) -> None:
        if average is not None:
            remove_own_hooks(average.ema)
        self._average = average

    def train(self) -> Any:
        """Train as the trainer behind it does, with the teacher's features."""
        try:
            return super().train()  # type: ignore[misc]
        finally:
            self._release()

    def _setup_train(self) -> None:
        for name, reason in (("compile", "hooks take the features"), ("distill_model", "it is a distillation too")):
            if value := getattr(self.args, name, None):
                raise ValueError(f"{name}={value!r} does not go with distilling(): {reason}. Leave one of the two out")
        super()._setup_train()  # type: ignore[misc]

    def build_optimizer(self, model: nn.Module, *arguments: Any, **options: Any) -> Optimizer:
        """Build the distiller, now that the model has its final form and place, and have its normalisation trained too."""
        student = unwrapped(model)
        if isinstance(head_of(student), RTDETRDecoder) and not isinstance(student, RTDETRDetectionModel):
            raise ValueError(
                f"the student is an RT-DETR, which {type(self).__bases__[-1].__name__} cannot train: give distilling() "
                "base=RTDETRTrainer, from ultralytics.models.rtdetr.train"
            )
        optimizer: Optimizer = super().build_optimizer(model, *arguments, **options)  # type: ignore[misc]
        self._release()
        teacher = self._teacher()
        example = torch.zeros(2, int(self.data.get("channels", 3)), self.args.imgsz, self.args.imgsz)
        chosen = self.settings.taps
        taps = found_taps(teacher, student, example, chosen) if isinstance(chosen, str) else chosen
        distiller = MatchingDistiller(teacher, student, **{"example": example, **self.settings.options, "taps": taps})
        self.distiller = distiller
        positions = positions_of(distiller)
        take_from_rank_0(tensors_in(positions.state_dict()))
        norms = [number for number, group in enumerate(optimizer.param_groups) if group.get("param_group") == "bn"]
        place = norms[-1] if norms else group_of_scales(student, optimizer)
        optimizer.param_groups[place]["params"] += positions.parameters()
        optimizer.register_state_dict_post_hook(self._keep)
        optimizer.register_load_state_dict_pre_hook(self._restore)
        self._step = _Step(distiller)
        for position in distiller.positions:
            LOGGER.info(f"matchdistill: {position.extra_repr()}")
        return optimizer

    def run_callbacks(self, event: str) -> None:
        """Refresh the matching before an epoch at which it is due."""
        if event == "on_train_epoch_start":
            self._refresh()
        super().run_callbacks(event)  # type: ignore[misc]

    def optimizer_step(self) -> None:
        """Average the gradients of the normalisation over the processes, which DDP does not know of, and step."""
        world = rank_and_world()[1]
        if world > 1:
            assert self.distiller is not None
            for parameter in positions_of(self.distiller).parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(world))
        super().optimizer_step()  # type: ignore[misc]

    def _teacher(self) -> nn.Module:
        """A copy of the teacher on the trainer's device, as far as to what goes into its heads."""
        given = self.settings.teacher
        if isinstance(given, str | Path):
            if str(given).endswith((".yaml", ".yml")):
                LOGGER.warning(
                    f"matchdistill: the teacher {given} has random weights: give the .pt file of a trained one"
                )
            family = RTDETR if "rtdetr" in Path(given).name.lower() else YOLO
            given = family(str(given))
        network = given.model if isinstance(given, Model) else given
        if not isinstance(network, nn.Module):
            raise ValueError(f"the teacher {network} is not a network of PyTorch: expected one, such as a .pt file")
        network = copy_of_model(network).float().to(self.device)
        wanted = getattr(network, "pretrained_cfg", None) or {}
        if "mean" in wanted and "std" in wanted:
            words = {"mean": list(wanted["mean"]), "std": list(wanted["std"])}
            convert_images(network, UNCHANGED, Preparation.of(words))
        taps = () if isinstance(self.settings.taps, str) else self.settings.taps
        head = head_of(network)
        into_head = head is not None and any(f"{tap}.".startswith(f"model.{head.i}.") for tap, _ in taps)
        return network if into_head else without_head(network)

    def _refresh(self) -> None:
        """Solve the matching anew over training images, if it is due before this epoch or there is none."""
        assert self.distiller is not None
        if self.distiller.has_matching and not due(self.epoch, self.settings.refresh_every):
            return
        rank, world = rank_and_world()
        take_from_rank_0(self.distiller.student.buffers())  # since the last step each process has had its own
        half = torch.bfloat16 if self.args.amp == "bf16" else torch.float16
        with random_state(), torch.autocast(self.device.type, half, enabled=bool(self.amp)):
            images = self._images(world)  # which draws at random, the first time
            seed = mix_seed("refresh", self.args.seed, self.epoch, rank)  # so that it is the same to a resumed run
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            found = self.distiller.refresh(images, self.settings.max_images, self._run)
        costs = ", ".join(f"{matching.mean_cost:.3f}" for matching in found)
        LOGGER.info(f"matchdistill: matched over {found[0].images} images, mean cost {costs}")

    def _images(self, world: int) -> DataLoader[Any]:
        """Training images in a random order, varied as in training, of this process its share.

        The data set is another one than the one that trains, whose mosaics are made of the images that it has read.
        """
        loader = self.train_loader
        if self._dataset is None:
            kept, self.args.cache = self.args.cache, False
            try:
                self._dataset = self.build_dataset(  # type: ignore[attr-defined]
                    self.data["train"], mode="train", batch=loader.batch_size
                )
            finally:
                self.args.cache = kept
        dataset: Any = self._dataset
        last = self.args.close_mosaic
        if last and self.epoch >= self.epochs - last and hasattr(dataset, "close_mosaic"):
            dataset.mosaic = False
            dataset.close_mosaic(hyp=copy.copy(self.args))
        sampler: Any = SequentialSampler(dataset) if getattr(dataset, "rect", False) else RandomSampler(dataset)
        if world > 1:
            sampler = DistributedSampler(dataset, seed=mix_seed("order", self.args.seed, self.epoch))
        return DataLoader(
            dataset,
            loader.batch_size,
            sampler=sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
        )

    def _run(self, batch: Any) -> None:
        """Run the student on a batch of a refresh."""
        assert self.distiller is not None
        self.distiller.student(self.preprocess_batch(batch)["img"])  # type: ignore[attr-defined]

    def _keep(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Put matching, margins and normalisation into the optimiser's part of a checkpoint."""
        if self.distiller is not None and self.distiller.has_matching:
            state[STATE] = positions_of(self.distiller).state_dict()

    def _restore(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Go on with the matching of a checkpoint."""
        assert self.distiller is not None
        if STATE not in state:
            raise ValueError(
                "the checkpoint to resume from has no matching: it was not made with distilling(). Resume without trainer=, "
                "or begin anew from its weights"
            )
        try:
            positions_of(self.distiller).load_state_dict(state[STATE])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "the matching of the checkpoint to resume from does not fit: it was made with another teacher, other taps "
                "or another reduction. Give distilling() what it was given then"
            ) from error
        self.distiller.has_matching = True

    def _release(self) -> None:
        """Leave the model as it would be without it."""
        if self._step is not None:
            self._step.remove()
        if self.distiller is not None:
            self.distiller.release()
        self.distiller = self._step = self._dataset = None


class _Step(OwnHook):
    """Adds the distillation loss to what the student returns for a batch of training: before and after its pass.

    It is a hook, so that DDP sees the loss, and stays when the module that calls the student is another one. A copy of the
    student, such as a validation's, runs without it.
    """

    def __init__(self, distiller: MatchingDistiller) -> None:
        self._distiller = distiller
        self._captured: Captured | None = None
        self._block: AbstractContextManager[Captured] | None = None
        student = distiller.student
        # The second is called after a pass that failed too, as one that had too little memory, which is tried again.
        self._handles = [
            student.register_forward_pre_hook(self),
            student.register_forward_hook(self, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        return self

    def __call__(self, student: nn.Module, arguments: Any, *returned: Any) -> Any:
        """Begin to take features, or add the loss to the losses and their names that were returned."""
        if not returned:
            batch = arguments[0]
            if student is self._distiller.student and student.training and isinstance(batch, dict):
                self._block = self._distiller.capture(batch["img"])
                self._captured = self._block.__enter__()
            return None
        block, captured = self._block, self._captured
        self._block = self._captured = None
        if block is None or captured is None:
            return None
        if returned[0] is None:
            block.__exit__(*sys.exc_info())
            return None
        block.__exit__(None, None, None)
        loss, items = returned[0]
        added: Tensor = self._distiller.loss(captured)
        items = {**items, COLUMN: added.detach()}
        if loss.ndim == 0:  # a mean over the images
            return loss + added, items
        # The parts of a loss, each summed over the images.
        return torch.cat([loss, added.to(loss.dtype).reshape(1) * len(captured.values[0])]), items

    def remove(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()

"""Hugging Face transformers: a `Trainer` that distils a teacher into the model that it trains.

Axes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback, set_seed

from matchdistill.distiller import MatchingDistiller
from matchdistill.distributed import rank_and_world, take_from_rank_0
from matchdistill.files import atomic_write
from matchdistill.integrations.optimizers import group_of_scales, positions_of
from matchdistill.matching import logged
from matchdistill.models.huggingface import Logits
from matchdistill.models.huggingface_detection import TransformersDetector
from matchdistill.options import MatchingOptions
from matchdistill.refresh import check_refreshes, due
from matchdistill.taps import resolve

OPTIMIZER = "optimizer.pt"  # in a checkpoint
WEIGHTS = "model.safetensors"  # of the model in a checkpoint
MATCHING = "matching.safetensors"  # in a checkpoint, beside the files of Trainer
REFRESHED = "refreshed"  # in it, the epoch of the last refresh


class MatchingDistillation:
    """What a `Trainer` of Hugging Face needs to distil, to be put before it: ``class Mine(MatchingDistillation, Trainer)``.

    The loss of every training step has one part more, from the features of the model and of the teacher, which sees the
    same inputs without the labels. Arguments, callbacks, DDP, accumulation, mixed precision and resuming stay the
    trainer's own. The model's modules and its saved files are the ones of the plain trainer: matching, margins and the
    student-side normalisation are in a file of their own in each checkpoint, and a resumed run continues as it would have.
    Logged are ``distillation_loss``, and at each refresh ``matching/cost_0`` and ``matching/churn_0`` of each position.

    For one device or one process for each GPU, not for DataParallel, DeepSpeed or FSDP.

    Args:
        arguments: of the trainer behind it, by position.
        teacher: the trained network; it is called with what the model is called with, such as ``pixel_values``.
        student: path of the part of the model that corresponds to the teacher; "": the whole model.
        refresh_every: epochs from one refresh of the matching to the next, 0 for a single one before training, or the
            epochs (from 0) themselves.
        max_images: the most images of a refresh, over all processes.
        distillation: fields of `MatchingOptions` by name, such as ``taps``, ``reduction`` or ``loss_weight``.
        options: of the trainer behind it, by name.

    Attributes:
        distiller: the distiller, while `train` runs.

    Raises:
        TypeError: an unknown field of `MatchingOptions`.
        ValueError: an option out of range, a teacher that is no network, or a student that returns no loss; at the start of
            `train`: networks, taps and weights that `MatchingDistiller` refuses, a way of training that it is not for, or a
            checkpoint to resume from that does not fit.
    """

    # What it takes from the trainer behind it.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    label_names: Sequence[str]

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module,
        student: str = "",
        refresh_every: int | Sequence[int] = 1,
        max_images: int = 20_000,
        distillation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_refreshes(refresh_every, max_images)
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                f"teacher={teacher!r}: expected a network, got a {type(teacher).__name__}: load it first, by the "
                "from_pretrained of its class, such as AutoModelForImageClassification"
            )
        self._teacher, self._path = teacher, student
        self._refresh_every, self._max_images = refresh_every, max_images
        self._options = MatchingOptions.of(**(distillation or {}))
        if self._options.online:
            raise ValueError("online: the trainer matches over the images of a loader, leave it out")
        self.distiller: MatchingDistiller | None = None
        self._guests: list[nn.Parameter] = []
        self._refreshed = -1
        self._losses: list[Tensor] = []
        self._source: DataLoader[Any] | None = None
        super().__init__(*arguments, **options)
        _check_student(self.model)
        self.add_callback(_Moments(self))  # type: ignore[attr-defined]

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as the trainer behind it does, with the teacher's features."""
        try:
            return super().train(*arguments, **options)  # type: ignore[misc]
        finally:
            self._release()

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """Build the distiller, now that the model has its place, and have the optimiser train the normalisation too."""
        self._begin()
        optimizer = super().create_optimizer(*arguments, **options)  # type: ignore[misc]
        assert self.distiller is not None
        optimizer.param_groups[group_of_scales(self.distiller.student, optimizer)]["params"] += self._guests
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """The loss of the trainer behind it, in training with the distillation loss added."""
        if self.distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)  # type: ignore[misc]
        mask = _mask(inputs)
        with self.distiller.capture() as captured:
            found = super().compute_loss(model, inputs, return_outputs, **options)  # type: ignore[misc]
        added = self.distiller.loss(captured, mask)
        self._losses.append(added.detach())
        added = added / self._divisor(options.get("num_items_in_batch"))
        return (found[0] + added, found[1]) if return_outputs else found + added

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Train a batch, and average the gradients of the normalisation, which DDP does not know of."""
        loss = super().training_step(*arguments, **options)  # type: ignore[misc]
        world = rank_and_world()[1]
        if world > 1 and self.accelerator.sync_gradients:
            for parameter in self._guests:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(world))
        return loss

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log the mean distillation loss beside the loss."""
        if "loss" in logs and self._losses:
            logs["distillation_loss"] = torch.stack(self._losses).mean().item()
            self._losses.clear()
        super().log(logs, *arguments, **options)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in a checkpoint the matching, margins and normalisation beside it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if not (_internal_call and output_dir and self.args.should_save and self.distiller is not None):
            return
        if self.distiller.has_matching:
            state = {name: value.contiguous() for name, value in positions_of(self.distiller).state_dict().items()}
            content = safetensors.torch.save({**state, REFRESHED: torch.tensor(self._refreshed)})
            atomic_write(Path(output_dir, MATCHING), lambda path: path.write_bytes(content))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint, MATCHING)
        if path is not None and path.is_file():
            assert self.distiller is not None
            state = safetensors.torch.load(path.read_bytes())
            self._refreshed = int(state.pop(REFRESHED))
            positions = positions_of(self.distiller)
            if _shapes(state) != _shapes(positions.state_dict()):
                raise ValueError(
                    f"{path} is of another teacher, student or other taps than these: resume with the same, or load the "
                    "model alone by from_pretrained and train it without resume_from_checkpoint"
                )
            positions.load_state_dict(state)
            self.distiller.has_matching = True
        elif path is not None and path.with_name(OPTIMIZER).is_file():
            raise ValueError(
                f"{path.parent} is the checkpoint of a trainer without distillation, it has no {MATCHING}, and its "
                f"{OPTIMIZER} does not fit: load the model alone by from_pretrained and train without resume_from_checkpoint"
            )
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]
        own, path = self.model if model is None else model, Path(checkpoint, WEIGHTS)
        if not path.is_file() or not hasattr(own, "from_pretrained"):
            return
        with safetensors.safe_open(path, "pt") as file:
            saved = set(file.keys())
        if own.state_dict().keys() - saved:
            # Files of DETR and others have other names than their modules. The trainer reads them as they are, and leaves
            # such weights at random; from_pretrained knows the names.
            own.load_state_dict(type(own).from_pretrained(checkpoint).state_dict())

    def refresh_matching(self, epoch: int) -> None:
        """Solve the matching anew over training images, if it is due before this epoch or there is none."""
        assert self.distiller is not None
        loaded = self._refreshed == epoch  # a run that goes on within an epoch has its matching
        if self.distiller.has_matching and (loaded or not due(epoch, self._refresh_every)):
            return
        take_from_rank_0(self.distiller.student.buffers())  # since the last step each process has had its own
        with isolate_rng():  # so that it is the same to a run that is resumed
            set_seed(self.args.seed + epoch)
            found = self.distiller.refresh(self._loader(epoch), self._max_images, self._run)
        self._refreshed = epoch
        super().log(logged(found))  # type: ignore[misc]

    def forget_gradients(self) -> None:
        """Forget the gradients of the normalisation: the trainer does so for the model alone."""
        for parameter in self._guests:
            parameter.grad = None

    def _begin(self) -> None:
        self._release()
        for refused, way in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
            if getattr(self, refused, False):
                raise ValueError(f"{way} shards the model, whose features are then not whole: train with DDP")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process drives {self.args.n_gpu} GPUs (DataParallel): start one for each with torchrun or accelerate "
                "launch, or let it see one (CUDA_VISIBLE_DEVICES)"
            )
        self._teacher.to(self.args.device)
        self._dropping = self._teacher.register_forward_pre_hook(self._without_labels, with_kwargs=True)
        try:
            student = resolve(self.model, self._path)
            self.distiller = MatchingDistiller(self._teacher, student, **vars(self._options))
        except ValueError:
            self._dropping.remove()
            raise
        self._guests = list(positions_of(self.distiller).to(self.args.device).parameters())

    def _release(self) -> None:
        """Leave model, teacher and optimiser as they would be without it."""
        if self.distiller is None:
            return
        optimizer: Any = getattr(self, "optimizer", None)
        own = {id(parameter) for parameter in self._guests}
        for group in () if optimizer is None else optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        self._dropping.remove()
        self.distiller.release()
        self.distiller, self._guests, self._refreshed = None, [], -1

    def _divisor(self, items: Any) -> int:
        """How much of the batches of a step this one is, where the trainer does not divide the sum of their losses."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            own = getattr(self, "compute_loss_func", None) is not None
            scaled = own or (items is not None and getattr(self, "model_accepts_loss_kwargs", False))
        return int(getattr(self, "current_gradient_accumulation_steps", 1)) if scaled else 1

    def _without_labels(self, teacher: nn.Module, arguments: Any, given: dict[str, Any]) -> Any:
        dropped = {*self.label_names, "labels", "num_items_in_batch"}
        return arguments, {name: value for name, value in given.items() if name not in dropped}

    def _loader(self, epoch: int) -> DataLoader[Any]:
        """Training images in a random order of this epoch, this process's share of them."""
        if self._source is None:
            self._source = self.get_train_dataloader()  # type: ignore[attr-defined]
        dataset: Any = self._source.dataset
        sampler: Any = None
        world = rank_and_world()[1]
        if world > 1 and not isinstance(dataset, IterableDataset):
            sampler = DistributedSampler(dataset, seed=self.args.seed)
            sampler.set_epoch(epoch)
        elif not isinstance(dataset, IterableDataset):
            sampler = RandomSampler(dataset)
        return DataLoader(
            dataset,
            self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self._source.collate_fn,
            num_workers=self.args.dataloader_num_workers,
        )

    def _run(self, batch: Any) -> Tensor | None:
        """Run the model on a batch of a refresh; the pixels that count, where images are padded."""
        inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            self.model(**self._without_labels(self.model, (), inputs)[1])
        return _mask(inputs)


class MatchingTrainer(MatchingDistillation, Trainer):  # type: ignore[misc]
    """The `Trainer` of Hugging Face with `MatchingDistillation`: it takes the arguments of both."""


class _Moments(TrainerCallback):
    """When the trainer refreshes the matching, and forgets gradients."""

    def __init__(self, trainer: MatchingDistillation) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.refresh_matching(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.forget_gradients()


def _check_student(model: Any) -> None:
    """Raise a ValueError if a model is one of `build_model`, whose forward pass leaves out the loss."""
    hooks = model._forward_hooks.values() if isinstance(model, nn.Module) else ()
    if isinstance(model, TransformersDetector) or any(isinstance(hook, Logits) for hook in hooks):
        raise ValueError(
            "the student is a network of build_model, build_segmenter or build_detector, which does not return the loss "
            "that the trainer needs: build it by transformers, such as AutoModelForImageClassification.from_pretrained"
        )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The pixels that belong to an image (N, H, W), bool, as image processors of detectors give them; None: all do."""
    mask = inputs.get("pixel_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 3 else None

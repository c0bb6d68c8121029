"""PyTorch Lightning: a callback that adds the distillation to the training of a LightningModule, which stays as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from matchdistill.distiller import MatchingDistiller
from matchdistill.distributed import rank_and_world, take_from_rank_0
from matchdistill.integrations.optimizers import group_of_scales, positions_of
from matchdistill.matching import logged
from matchdistill.options import MatchingOptions
from matchdistill.probing import copy_of_model
from matchdistill.refresh import check_refreshes, due
from matchdistill.taps import resolve
from matchdistill.trace import tensors_in

GUESTS = "matching_distillation_optimizer"  # in a checkpoint


class MatchingDistillation(pl.Callback):
    """Distils a teacher into the student that a LightningModule trains.

    While `fit` runs, the loss that the module's ``training_step`` returns (a tensor, or a dictionary with "loss") has one
    part more, from the features of the step's last call of the student. The module's state has the entries of the plain
    module; matching, margins and the student-side normalisation are in the callback's part of the checkpoint, and a resumed
    run continues as it would have. The normalisation is trained by the module's optimiser, in the parameter group of the
    student's scales and biases, and is there only while the optimiser steps: callbacks find the parameters that the module
    has given it. Logged are "distillation_loss" at every step, and at every refresh "matching/cost_0" and
    "matching/churn_0" of each position.

    For one device or DDP. It works with ``lightning.pytorch`` as well, given in a list: ``Trainer(callbacks=[...])``.

    Args:
        teacher: the trained network; its weights are in neither parameters nor checkpoints.
        student: attribute path of the student in the module; "": the module itself.
        refresh_every: epochs from one refresh of the matching to the next, 0 for a single one before training, or the
            epochs (from 0) themselves.
        max_images: the most images of a refresh, over all processes.
        forward: runs the student on a batch of a refresh, which is as ``training_step`` gets it; None: the batch's first
            tensor holds the images, which the student takes. What it returns is described at `MatchingDistiller.refresh`.
        loader: what a refresh takes its batches from; None: the training loader.
        options: fields of `MatchingOptions`, such as ``taps``, ``reduction`` or ``loss_weight``.

    Attributes:
        distiller: the distiller, while `fit` runs.

    Raises:
        TypeError: an unknown option.
        ValueError: an option that is out of range, or `online`. At the start of `fit`: a module that optimises manually,
            an optimiser that does not train the student, no student at that path, or networks, taps and weights that
            `MatchingDistiller` refuses.

    Examples:
        >>> callback = MatchingDistillation(nn.Linear(8, 2), student="net", refresh_every=2, loss_weight="paper")
        >>> trainer = pl.Trainer(max_epochs=4, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: str = "model",
        refresh_every: int | Sequence[int] = 1,
        max_images: int = 20_000,
        forward: Callable[[Any], Any] | None = None,
        loader: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        if options.get("online"):
            raise ValueError("online: the callback matches over the images of a loader, leave it out")
        check_refreshes(refresh_every, max_images)
        self.teacher, self.student, self.refresh_every = teacher, student, refresh_every
        self.max_images, self.forward, self.loader = max_images, forward, loader
        self.options = MatchingOptions.of(**options)
        self.distiller: MatchingDistiller | None = None
        self._state: dict[str, Any] = {}
        self._guests: _Guests | None = None
        # What an optimiser knew of the normalisation: the last one, and the one of a checkpoint to go on from.
        self._known: list[dict[str, Any]] = []
        self._loaded: list[dict[str, Any]] = []
        self._own: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the run before, where a new one begins."""
        if stage == "fit" and trainer.global_step == 0:
            self._state, self._loaded = {}, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the distiller, now that the module has its final form and place, and put it into the training step."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimises manually: its loss cannot be added to; use MatchingDistiller in its "
                "training_step"
            )
        # A copy, as a precision may change the weights for good.
        teacher = trainer.precision_plugin.convert_module(copy_of_model(self.teacher)).to(pl_module.device)
        distiller = MatchingDistiller(teacher, resolve(pl_module, self.student), **vars(self.options))
        try:
            guests = _Guests(distiller, trainer.optimizers[0])
        except ValueError:
            distiller.release()
            raise
        take_from_rank_0(tensors_in(positions_of(distiller).state_dict()))
        self.distiller, self._guests = distiller, guests
        # Called after every other hook before a step. Scaled gradients are looked at earlier.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        replaced = {"training_step": self._distilled(pl_module, pl_module.training_step)}
        if not scaled:
            replaced["configure_gradient_clipping"] = guests.before(pl_module.configure_gradient_clipping)
        self._enters_early = scaled
        self._own = {name: vars(pl_module).get(name) for name in replaced}
        vars(pl_module).update(replaced)
        self.load_state_dict(self._state)
        guests.load_state_dict(self._loaded)
        self._loaded = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refresh the matching where it is due."""
        if due(trainer.current_epoch, self.refresh_every):
            self._refresh(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Match before the first step of a run that goes on from a checkpoint without a matching."""
        assert self.distiller is not None
        if not self.distiller.has_matching:
            self._refresh(trainer, pl_module)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Forget the gradients of the normalisation too."""
        if self.distiller is not None:
            positions_of(self.distiller).zero_grad()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Average the gradients of the normalisation over the processes: DDP has wrapped the module without it."""
        if self.distiller is None:
            return
        world = rank_and_world()[1]
        if world > 1:
            for parameter in positions_of(self.distiller).parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(world))
        assert self._guests is not None
        if self._enters_early:
            self._guests.enter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the optimiser as the module made it, also where it did not step."""
        if self._guests is not None:
            self._guests.leave()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Matching, margins and normalisation; empty before the first refresh."""
        if self.distiller is None:
            return self._state
        return positions_of(self.distiller).state_dict() if self.distiller.has_matching else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a matching; Lightning calls it before or after `on_fit_start`, as the strategy wants it."""
        self._state = state_dict
        if self.distiller is not None and state_dict:
            positions_of(self.distiller).load_state_dict(state_dict)
            self.distiller.has_matching = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the optimiser knows of the normalisation, such as its momentum."""
        checkpoint[GUESTS] = self._known if self._guests is None else self._guests.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what the optimiser knew."""
        self._loaded = checkpoint.get(GUESTS, [])
        if self._guests is not None:
            self._guests.load_state_dict(self._loaded)

    def _distilled(self, pl_module: pl.LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """A training step whose loss has the distillation loss added."""

        @functools.wraps(step)  # Lightning looks at the arguments' names
        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self.distiller is not None
            try:
                with self.distiller.capture() as captured:
                    output = step(*args, **kwargs)
                    if not _has_loss(output):
                        raise _NoLossError  # past the check that the student has run
            except _NoLossError:
                return output
            loss = self.distiller.loss(captured)
            pl_module.log("distillation_loss", loss)
            return output + loss if isinstance(output, Tensor) else {**output, "loss": output["loss"] + loss}

        return training_step

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.distiller is not None
        take_from_rank_0(self.distiller.student.buffers())  # since the last step each process has had its own
        loader = trainer.train_dataloader if self.loader is None else self.loader
        if self.loader is None and isinstance(loader, Mapping | list | tuple):
            raise ValueError(
                f"the module trains on a {type(loader).__name__} of loaders, a refresh takes batches of one: give loader="
            )
        with trainer.precision_plugin.forward_context():
            matchings = self.distiller.refresh(_Batches(trainer, loader), self.max_images, self.forward)
        pl_module.log_dict(logged(matchings), sync_dist=True)

    def _release(self, pl_module: pl.LightningModule) -> None:
        if self.distiller is None:
            return
        assert self._guests is not None
        self._guests.leave()
        self._state, self._known = self.state_dict(), self._guests.state_dict()
        self._guests.remove()
        self.distiller.release()
        self.distiller = self._guests = None
        for name, own in self._own.items():
            del vars(pl_module)[name]
            if own is not None:
                vars(pl_module)[name] = own


class _NoLossError(Exception):
    pass


class _Batches:
    """A loader's batches as a training step gets them: on the device, and through the hooks of module and data module."""

    def __init__(self, trainer: pl.Trainer, loader: Any) -> None:
        if isinstance(loader, DataLoader):
            loader = copy.copy(loader)
            # Its workers are kept for the epoch that Lightning has begun with it; these are others.
            vars(loader).update(_iterator=None, persistent_workers=False)
        self._trainer, self._loader = trainer, loader
        self.sampler, self.batch_sampler = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = self._trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _has_loss(output: Any) -> bool:
    return isinstance(output, Tensor) or (isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor))


class _Guests:
    """The parameters of the normalisation, which are in the module's optimiser only while it steps.

    They belong to the parameter group of the student's scales and biases. Callbacks look the parameters of an optimiser up
    among those of the module: therefore they are there only for the step.

    Raises:
        ValueError: the optimiser trains no parameter of the student, though some are to be trained.
    """

    def __init__(self, distiller: MatchingDistiller, optimizer: Optimizer) -> None:
        self._place = group_of_scales(distiller.student, optimizer)
        self._optimizer, self._inside = optimizer, False
        self._parameters = list(positions_of(distiller).parameters())
        self._states: dict[Tensor, Any] = {}
        self._handle = optimizer.register_step_post_hook(lambda *_: self.leave())

    def before(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """The clipping of gradients, which is the last thing before a step, with them in the optimiser."""

        @functools.wraps(clip)
        def clipping(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            return clip(*args, **kwargs)

        return clipping

    def enter(self) -> None:
        """Join the group."""
        if not self._inside:
            self._inside = True
            self._optimizer.param_groups[self._place]["params"] += self._parameters
            self._optimizer.state.update(self._states)

    def leave(self) -> None:
        """Leave the group, with what the optimiser has kept of the parameters."""
        if self._inside:
            self._inside = False
            own, group = set(self._parameters), self._optimizer.param_groups[self._place]["params"]
            group[:] = [parameter for parameter in group if parameter not in own]
            self._states = {parameter: self._optimizer.state.pop(parameter, {}) for parameter in self._parameters}

    def remove(self) -> None:
        """Take the hook off the optimiser."""
        self._handle.remove()

    def state_dict(self) -> list[dict[str, Any]]:
        """What the optimiser has kept, by parameter; empty before its first step."""
        return [self._states[parameter] for parameter in self._parameters if parameter in self._states]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on with what it had kept."""
        group = self._optimizer.param_groups[self._place]
        counts = group.get("capturable") or group.get("fused")  # then the count of steps is on the device too

        def there(parameter: Tensor, name: str, value: Any) -> Any:
            return value.to(parameter.device) if isinstance(value, Tensor) and (name != "step" or counts) else value

        self._states = {
            parameter: {name: there(parameter, name, value) for name, value in state.items()}
            for parameter, state in zip(self._parameters, states, strict=bool(states))
        }

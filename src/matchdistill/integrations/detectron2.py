"""Detectron2: a wrapper of the student and a hook, for its own trainers, data loaders and checkpointer.

Axes: N batch, H and W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from matchdistill.distiller import MatchingDistiller
from matchdistill.distributed import rank_and_world
from matchdistill.matching import Matching, logged
from matchdistill.refresh import are_phases, check_refreshes, due_at_step
from matchdistill.taps import unwrapped
from matchdistill.tasks.detection.checks import check_same_input
from matchdistill.tasks.detection.parts import pixel_mask

try:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
    from detectron2.data.samplers import TrainingSampler
    from detectron2.engine import HookBase
    from detectron2.modeling import build_model
except ImportError as error:
    raise ImportError(
        "matchdistill.integrations.detectron2 needs Detectron2, which is built from its repository: "
        "docs/howto/detection.md says how"
    ) from error

Batch = list[dict[str, Any]]  # one dictionary for each image, as Detectron2's mappers make it

OWN = "distiller."  # in the wrapper's state: what the student does not have
BODY = "distiller.student."  # in the distiller's: the part of the student that is there under its own name too

# Detectron2 shows the messages of loggers under its own name.
_logger = logging.getLogger("detectron2.matchdistill")


class DistilledModel(nn.Module):
    """A Detectron2 model whose training forward has one loss more: what its backbone differs from a teacher's.

    In evaluation it is the student. Its state has the student's entries under their own names, so that a checkpoint of
    the student loads into it and one of it into the student, and matching, margins and normalisation under "distiller.".
    The teacher is not in it, nor among the parameters. Of the teacher the backbone's body alone is kept, and run once a
    step on the batch that the student has padded; the padding is left out.

    Args:
        student: a detector with `backbone` and `preprocess_image`: RetinaNet, FCOS, Faster, Mask and Cascade R-CNN, ...
        teacher: another one that prepares images in the same way, with its weights loaded; see `load_teacher`.
        options: fields of `MatchingOptions`, for example ``norm=group_norm``, or the paper's loss for detectors:
            ``loss_weight=[2e-8, 2e-8, 2e-7, 2e-7], loss_reduction="sum"``.

    Attributes:
        student: the student, as it was given: the network to deploy.
        distiller: the distiller of the two bodies, `backbone.bottom_up` or, where there is none, `backbone`.

    Raises:
        TypeError: an unknown option.
        ValueError: a model without backbone, a teacher that prepares images differently, or bodies, taps and options that
            `MatchingDistiller` refuses.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, **options: Any) -> None:
        super().__init__()
        check_same_input(teacher, student, ("pixel_mean", "pixel_std", "input_format"))
        self.student = student
        self.distiller = MatchingDistiller(_body(teacher), _body(student), **options)
        self.register_state_dict_post_hook(_to_students_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_students_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_report_students_names)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """What it does not have is the student's: Detectron2's checkpointer looks there for what does not fit."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":  # not there yet
                raise
            return getattr(self.student, name)

    def forward(self, batched_inputs: Batch) -> Any:
        """In training the student's losses and "loss_features", else the student's detections.

        Raises:
            RuntimeError: in training, before the first `refresh`.
        """
        if not self.training:
            return self.student(batched_inputs)
        with self.distiller.capture() as captured:
            losses = self.student(batched_inputs)
        assert captured.arguments is not None
        mask = _mask(captured.arguments[0][0], batched_inputs)
        return {**losses, "loss_features": self.distiller.loss(captured, mask)}

    def refresh(
        self, loader: Iterable[Batch], max_images: int = 16_000, tolerance: float | None = None
    ) -> list[Matching]:
        """Solve the matching over a training loader's images: of each process its own share, as Detectron2 deals them out.

        The state of the random number generators is the same afterwards: of torch on the CPU, NumPy and Python, which
        draw the augmentations.

        Raises:
            ValueError: no images, costs that are not finite, or limits out of range.
        """
        with _generators_kept():
            return self.distiller.refresh(_Dealt(loader), max_images, self._run_body, tolerance)

    def _run_body(self, batched_inputs: Batch) -> Tensor | None:
        images = self.student.preprocess_image(batched_inputs).tensor  # type: ignore[operator]
        self.distiller.student(images)
        return _mask(images, batched_inputs)


class RefreshMatching(HookBase):  # type: ignore[misc]
    """Refreshes the matching of a trainer's `DistilledModel` before the iterations at which it is due.

    Also before the first one of a model that has no matching yet. Put it before other hooks, so that their timers do not
    count it. What the matching costs, and which share of the teacher's channels changed groups, goes to the log and to
    the storage ("matching/cost_0", "matching/churn_0", ...), as do the losses of the positions ("features/0", ...).

    Args:
        loader: makes the loader for a refresh, from its iteration; `refresh_loader` does.
        phases: [from iteration, every], ascending: from that iteration on, at the multiples of `every`; the default is
            the paper's.
        max_images: the most images, over all processes; the default is the paper's.
        tolerance: stop a refresh once more images would lower the mean cost of the matched pairs by no more than this
            share of it; None: take `max_images`.

    Raises:
        ValueError: phases that are no ascending pairs, or no image.
    """

    def __init__(
        self,
        loader: Callable[[int], Iterable[Batch]],
        phases: Sequence[Sequence[int]] = ((0, 5000), (20_000, 31_000)),
        max_images: int = 16_000,
        tolerance: float | None = None,
    ) -> None:
        if not are_phases(phases):
            raise ValueError(
                f"phases is {phases!r}: expected pairs [from iteration, every], ascending, the first from iteration 0"
            )
        check_refreshes(0, max_images)
        self._loader, self._phases, self._limits = loader, phases, (max_images, tolerance)

    def before_step(self) -> None:
        """Refresh the matching where it is due."""
        iteration, model = self.trainer.iter, self._model()
        if model.distiller.has_matching and not due_at_step(iteration, self._phases):
            return
        matchings = model.refresh(self._loader(iteration), *self._limits)
        for matching in matchings:
            _logger.info(f"Matching refreshed before iteration {iteration}, {matching}")
        self.trainer.storage.put_scalars(smoothing_hint=False, **logged(matchings))

    def after_step(self) -> None:
        """Store the loss of each position."""
        losses = self._model().distiller.position_losses.tolist()
        self.trainer.storage.put_scalars(**{f"features/{number}": loss for number, loss in enumerate(losses)})

    def _model(self) -> DistilledModel:
        model = unwrapped(self.trainer.model)
        if not isinstance(model, DistilledModel):
            raise ValueError(f"the trainer's model is a {type(model).__name__}: expected a DistilledModel")
        return model


def load_teacher(cfg: Any) -> nn.Module:
    """The model of a Detectron2 config with the weights that it names.

    Raises:
        ValueError: it names none.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("the teacher's cfg.MODEL.WEIGHTS is empty: expected the file of a trained detector")
    teacher: nn.Module = build_model(cfg)
    DetectionCheckpointer(teacher).load(cfg.MODEL.WEIGHTS)
    return teacher.eval()


def refresh_loader(cfg: Any, iteration: int) -> Iterable[Batch]:
    """Detectron2's training loader of a config, apart from the one that trains: as many images as the set has.

    Which images come first depends on the iteration and on ``cfg.SEED``; each process gets its share of them.
    """
    dataset = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    sampler = TrainingSampler(len(dataset), seed=max(cfg.SEED, 0) + iteration)
    loader = build_detection_train_loader(cfg, dataset=dataset, sampler=sampler)
    left = -(-len(dataset) // rank_and_world()[1])  # the sampler never ends
    for batch in loader:
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


class _Dealt:
    """A loader that deals the images out to the processes, which `matchdistill.distributed.is_sharded` can see."""

    sharded = True

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.sampler = self

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _body(model: nn.Module) -> nn.Module:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module) or not hasattr(model, "preprocess_image"):
        raise ValueError(
            f"a {type(model).__name__} has not both backbone and preprocess_image: expected a detector of Detectron2"
        )
    body = getattr(backbone, "bottom_up", backbone)
    assert isinstance(body, nn.Module)
    return body


def _mask(padded: Tensor, batched_inputs: Batch) -> Tensor | None:
    """Which pixels of a padded batch belong to an image, bool (N, H, W); None where all of them do."""
    return pixel_mask(ImageList(padded, [tuple(each["image"].shape[-2:]) for each in batched_inputs]))


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _to_students_names(model: DistilledModel, state: dict[str, Any], prefix: str, _: Any) -> None:
    versions = getattr(state, "_metadata", {})
    for names in (versions, state):
        for name in [name for name in names if name.startswith((f"{prefix}student.", prefix + OWN))]:
            own, value = name.removeprefix(prefix), names.pop(name)
            if not own.startswith(BODY):
                names[prefix + own.removeprefix("student.")] = value


def _from_students_names(model: DistilledModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    body = next(path for path, module in model.student.named_modules() if module is model.distiller.student)
    versions = getattr(state, "_metadata", {})
    for names in (versions, state):
        for name in [name for name in names if name.startswith(prefix) and not name.startswith(prefix + OWN)]:
            own = name.removeprefix(prefix)
            names[f"{prefix}student.{own}"] = value = names[name] if names is versions else names.pop(name)
            if own.startswith(f"{body}."):
                names[f"{prefix}{BODY}{own.removeprefix(f'{body}.')}"] = value


def _report_students_names(model: DistilledModel, keys: tuple[list[str], list[str]]) -> None:
    """What a checkpoint lacks, or has too much of, under the names that it has there."""
    for names in keys:
        names[:] = [name.removeprefix("student.") for name in names if not name.startswith(BODY)]

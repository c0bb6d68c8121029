"""Whether a teacher is worth learning from: it is measured on some images before its student is trained."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric as Measure

from matchdistill.files import read_json, write_json
from matchdistill.models.build import weights_file
from matchdistill.probing import copy_of_model, evaluating, unchanged
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.starting import run_in
from matchdistill.runs.store import CELLS, MODEL
from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule

JUDGED = Path("evidence", "teacher.json")  # what was measured, by network
IMAGES = 300  # that a network is measured on
ENOUGH = 200  # images from which on a weak teacher is refused; below that a line says what was measured
NOTHING = 0.001  # a value up to which a network finds nothing


@dataclass(frozen=True)
class Judged:
    """How good a network is on some validation images.

    Attributes:
        value: of the task's metric.
        chance: the metric with the labels of other images: what the network would get if it knew nothing of an image.
        images: how many there were.
    """

    value: float
    chance: float
    images: int

    def knows_nothing(self, of_images: bool) -> bool:
        """Whether the value cannot be told from what it is where a network knows nothing.

        Args:
            of_images: whether it is a share of the images, so that both values vary as shares do.
        """
        share = max(self.value, self.chance) if of_images else self.chance
        return self.value <= max(NOTHING, self.chance + _noise(share, self.images))

    def worse_than(self, other: Judged) -> bool:
        """Whether the value is below another one by more than noise."""
        return other.value - self.value > max(_noise(each.value, each.images) for each in (self, other))


def _noise(share: float, images: int) -> float:
    """Two standard errors of the difference of two shares of so many images."""
    share = min(max(share, 0.0), 1.0)
    return 2 * math.sqrt(2 * share * (1 - share) / images)


CAUSES = (
    "Likely causes: untrained weights (teacher.weights, teacher.training.epochs), classes in another order than the data's, "
    "images prepared in another way than it was trained with (teacher.preparation)"
)


def weakness(metric: Metric, name: str, teacher: Judged, student: Judged | None) -> str | None:
    """Why a teacher is not worth learning from; None: it is worth it.

    Args:
        metric: that both are measured by.
        name: of the teacher.
        teacher: what it came to.
        student: what its student came to before any training; None: its head is untrained.
    """
    of = f"{metric.label} {metric.shown(teacher.value)} on {teacher.images} validation images"
    if teacher.knows_nothing(metric.of_images):
        found = f"knows nothing of these classes: {of}, {metric.shown(teacher.chance)} with the labels of other images"
    elif student is not None and teacher.worse_than(student):
        found = f"is worse than its student before training: {of}, the student has {metric.shown(student.value)}"
    else:
        return None
    return f"the teacher {name} {found}"


class TeacherCheck:
    """Measures the teacher of a run, and its student where that has a trained head, each once.

    Args:
        recipe: of the run.
        module: of the recipe.
        out: folder of the run. Runs of a comparison keep what was measured in the comparison's folder.
    """

    def __init__(self, recipe: Recipe, module: DistilledModule, out: Path) -> None:
        self.recipe, self.module = recipe, module
        inside = out.absolute().parent.parent.name == CELLS
        self.path = (out.absolute().parents[2] if inside else out) / JUDGED
        self.known: dict[str, Any] = dict(read_json(self.path)) if self.path.is_file() else {}

    @property
    def applies(self) -> bool:
        """Whether the teacher's head was trained for the classes of the data, so that its output says how good it is."""
        recipe, teacher = self.recipe, self.recipe.teacher
        labels = TASKS[recipe.task].learns_from == "labels"
        if self.module.teacher is None or not labels or len(self.module.measures) < 2 or not self.module.metrics:
            return False
        if recipe.distillation.parsed.kd or teacher.training.epochs or teacher.weights is None:
            return True  # without weights it is random, or its function loads them
        if teacher.fresh_head or weights_file(teacher.weights) is None:
            return False  # a head of other classes, which methods of features leave alone
        run = run_in(teacher.weights)
        return run is None or read_json(run / MODEL).get("class_names") == recipe.data.class_names

    def found(self, device: torch.device) -> str | None:
        """Why the teacher is not worth learning from; None: it is, or nothing is known of it."""
        if not self.applies:
            return None
        metric, named = self.module.metrics[0], self.recipe.student
        assert self.module.teacher is not None
        teacher = self._judged(self.module.teacher, metric, device)
        starts_trained = named.weights is not None and not named.fresh_head
        student = None
        if starts_trained:
            with contextlib.suppress(ValueError):  # a network that cannot be copied is not measured
                student = self._judged(copy_of_model(self.module.network()), metric, device)
        weak = None if teacher is None else weakness(metric, str(self.recipe.teacher.name), teacher, student)
        if weak is None or teacher is None:
            return None
        if self.recipe.teacher.allow_weak:
            return f"{weak}. It teaches all the same: teacher.allow_weak is set. {CAUSES}"
        if teacher.images < ENOUGH or not (metric.of_images or teacher.value <= NOTHING):
            return f"{weak}. That is not certain, so it teaches all the same. {CAUSES}"
        raise ValueError(
            f"{weak}. Give a teacher that is better, or --allow-weak-teacher if this one is meant. {CAUSES}"
        )

    def keep(self) -> None:
        """Write down what was measured, so that no other run of the comparison and no resume measures it again."""
        there = dict(read_json(self.path)) if self.path.is_file() else {}
        if (both := {**there, **self.known}) != there:
            write_json(self.path, both)

    def _judged(self, network: nn.Module, metric: Metric, device: torch.device) -> Judged | None:
        key = self._key(network)
        if key not in self.known:
            judged = judge(self.module, network, metric, self.recipe.data, device)
            if judged is None:
                return None
            self.known[key] = asdict(judged)
        return Judged(**self.known[key])

    def _key(self, network: nn.Module) -> str:
        """By what is measured: weights, images and how they are prepared."""
        digest = hashlib.sha256()
        for name, value in network.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        config = self.recipe.config
        told = [self.recipe.task, config["data"], config["teacher"]["preparation"], config["student"]["preparation"]]
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]


@torch.no_grad()
def judge(
    module: DistilledModule, network: nn.Module, metric: Metric, data: Any, device: torch.device
) -> Judged | None:
    """Measure a network on validation images, and on the same images with their labels shuffled.

    Nothing of the network changes. Returns None where there is less than two images.
    """
    measures = [_alone(module.measures[1]).to(device) for _ in range(2)]
    images = 0
    before = next((value.device for value in network.parameters()), device)
    with evaluating(network), unchanged(network):
        network.to(device)
        for batch in _batches(data):
            batch = module.transfer_batch_to_device(batch, device, 0)
            module.measure(measures[0], network, batch)
            module.measure(measures[1], network, (_turned(batch[0]), *batch[1:]))
            images += len(batch[0])
        network.to(before)
    if not images:
        return None
    values = [module.results(measure.compute()).get(metric.name) for measure in measures]
    if values[0] is None:
        return None
    return Judged(values[0], values[1] or 0.0, images)


def _alone(measure: nn.Module) -> Any:
    """A copy of a measure that adds up what this process has seen."""
    own = copy.deepcopy(measure)
    for part in own.modules():
        if isinstance(part, Measure):
            part.sync_on_compute = part._to_sync = False
            part.reset()
    return own


def _batches(data: Any) -> Iterator[Any]:
    """Validation images from all over the set, in an order that has nothing to do with their classes."""
    total = len(data.val_set)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()
    size = min(max(2, data.options.batch_size), 64)  # as much memory as validation takes
    for first in range(0, len(chosen), size):
        part = chosen[first : first + size]
        if len(part) > 1:  # the labels of other images need another image
            yield data.val_set.__getitems__(part)


def _turned(images: Any) -> Any:
    """Each image in the place of the one after it."""
    return images.roll(1, 0) if isinstance(images, Tensor) else [*images[-1:], *images[:-1]]

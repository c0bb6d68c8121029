"""What trains a student without labels: its teacher's features alone.

Axes: N batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric as Measure

from matchdistill.features import FeatureDistiller
from matchdistill.functional import cost_of, similarity_sum, solve_assignment, wide
from matchdistill.matching import objective
from matchdistill.probing import scratch
from matchdistill.runs.settings import Settings
from matchdistill.tasks.features.pooling import Pooling, part_of
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.neighbours import BY_LABELS, Batch, SeparatingModule, Separation

LIKENESS = Metric("matched_cosine", "cosine of matched pairs", share=False)
HELD_OUT = Metric("held_out_loss", "held-out feature loss", higher_is_better=False, share=False)
WITHOUT_LABELS = (LIKENESS, HELD_OUT)


class FeaturesModule(SeparatingModule):
    """Trains a student on its teacher's features.

    With labels both networks are measured by how well their pooled outputs tell the classes apart; without, the student by
    how like its teacher's its features are.

    Args:
        student: the network; `part_of` it is distilled.
        settings: of the run.
        poolings: where the pooled outputs of student and teacher are.
        labelled: whether the labels say anything.
        teacher: the teacher, to measure.
        distiller: of the parts of both; None: nothing is trained.
        compared: of these parts too, to compare their features with; None: the distiller is.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: Settings,
        poolings: tuple[Pooling, Pooling | None],
        labelled: bool,
        teacher: nn.Module | None = None,
        distiller: FeatureDistiller | None = None,
        compared: FeatureDistiller | None = None,
    ) -> None:
        compared = compared or distiller
        measures: list[Measure] = [Separation(), Separation()] if labelled else []
        if not labelled and compared is not None:
            measures = [Likeness(compared)]
        super().__init__(student, settings, BY_LABELS if labelled else WITHOUT_LABELS, measures, distiller)
        self.labelled, self._poolings = labelled, poolings
        if distiller is not None and not labelled:
            self.measured_with = ("distiller.positions.",)
        self._teacher, self._compared = (teacher,), (compared,)  # in tuples: not saved with the student
        if distiller is not None:
            _freeze_rest(student, distiller)

    @property
    def teacher(self) -> nn.Module | None:
        """The whole teacher, if there is one."""
        return self._teacher[0]

    @property
    def learns(self) -> bool:
        """Whether a teacher's features are distilled: nothing else is learned from."""
        return self.distiller is not None

    def _apply(self, fn: Any, recurse: bool = True) -> FeaturesModule:
        for other in (*self._teacher, *self._compared):
            if other is not None and other is not self.distiller:
                other._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def pooled(self, network: nn.Module, images: Tensor) -> Tensor:
        """The pooled output (N, C) of the student or the teacher."""
        pooling = self._poolings[0 if network is self.network() else 1]
        assert pooling is not None
        return pooling(part_of(network), images).float()

    def batch_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of the features."""
        assert self.distiller is not None
        images, _ = batch
        with self.distiller.capture(images) as captured:
            self.distiller.student(images)
        return {"features": self.distiller.loss(captured)}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Where no validation follows the last step of an epoch, look here at what it did to the weights."""
        if self.trainer.is_last_batch and not self.validates():
            with torch.no_grad(), scratch(part_of(self.network())) as probe:
                self.check_output(self._poolings[0](probe.eval(), batch[0]))

    def measure(self, measure: Any, network: nn.Module, batch: Batch) -> None:
        """Take the pooled outputs of a network, or compare the features of both."""
        images, labels = batch
        if self.labelled:
            self.measure_neighbours(measure, network, images, labels)
            return
        compared = self._compared[0]
        assert compared is not None
        with compared.capture() as captured:
            compared.student(images)
        measure.update(captured, len(images), self.distiller is not None)


def _freeze_rest(student: nn.Module, distiller: FeatureDistiller) -> None:
    """Nothing trains what leads to no position: several processes would wait for its gradients."""
    unreached = set(distiller.unreached)
    trained = {id(each) for name, each in distiller.student.named_parameters() if name not in unreached}
    for parameter in student.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


class Likeness(Measure):
    """How like its teacher's a student's features are, over the images of all processes.

    The cosine is the one of student channels and the teacher channels that resemble them most on these images, each
    matched once: a mean over the pairs of a position and over the positions. So methods with and without a matching of
    their own can be compared. The cosine of maps is the mean over the images; pooled values have one number for each image,
    and their cosine is over all images, however these come in batches. The loss is the method's own.

    Args:
        distiller: of both.
    """

    full_state_update = False
    count: Tensor
    loss: Tensor

    def __init__(self, distiller: FeatureDistiller) -> None:
        super().__init__()
        self._distiller = (distiller,)  # in a tuple: not a part of the measure
        # Made before it is known where the network will be trained: where there is an Apple GPU, that is its default.
        dtype = wide(torch.device("mps" if torch.backends.mps.is_available() else "cpu"))
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("loss", torch.tensor(0.0, dtype=dtype), dist_reduce_fx="sum")
        for number, position in enumerate(distiller.positions):
            widths = position.student_channels, position.teacher_channels
            # Of pooled values no maps are counted: products and squares are summed instead of cosines.
            for name, shape in (("sums", widths), ("student", widths[:1]), ("teacher", widths[1:]), ("maps", ())):
                state = torch.zeros(shape, dtype=dtype)
                self.add_state(f"{name}{number}", state, dist_reduce_fx="sum")

    def update(self, captured: Any, images: int, trained: bool) -> None:
        """Add a batch.

        Args:
            captured: what the distiller has captured of the student.
            images: how many there are.
            trained: whether the distiller has a loss.
        """
        distiller = self._distiller[0]
        values = distiller.whole_values(captured)
        for number, position in enumerate(distiller.positions):
            student, teacher = position.maps(captured.values[number], values[number])
            if captured.values[number].ndim == values[number].ndim == 2:
                own, others = (maps[0].detach().to(wide(maps.device)) for maps in (student, teacher))
                getattr(self, f"sums{number}").add_(own @ others.T)
                getattr(self, f"student{number}").add_(own.square().sum(1))
                getattr(self, f"teacher{number}").add_(others.square().sum(1))
            else:
                getattr(self, f"sums{number}").add_(similarity_sum(student, teacher))
                getattr(self, f"maps{number}").add_(len(student))
        self.count += images
        if trained:
            self.loss += distiller.loss(captured) * images

    def compute(self) -> dict[str, Tensor]:
        """The values by name."""
        found = []
        for number in range(len(self._distiller[0].positions)):
            sums, student, teacher, maps = (
                getattr(self, f"{name}{number}") for name in ("sums", "student", "teacher", "maps")
            )
            if maps == 0:
                lengths = torch.outer(student.sqrt(), teacher.sqrt())
                sums, maps = sums / lengths.masked_fill(lengths == 0, 1), torch.ones_like(maps)
            cost = cost_of(sums, int(maps))
            found.append(1 - objective(cost, solve_assignment(cost, 1)) / 2)
        values = {LIKENESS.name: torch.tensor(found).mean()}
        return values | ({HELD_OUT.name: self.loss / self.count} if self.loss else {})

"""How well features tell classes apart, with no head on them: by nearest neighbours, and by a linear probe.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric as Measure
from torchmetrics.utilities.data import dim_zero_cat

from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.picture import Picture

KNN, PROBE = Metric("knn", "20-NN"), Metric("probe", "linear probe")
BY_LABELS = (KNN, PROBE)
NEIGHBOURS = 20
CHUNK = 1024  # images whose neighbours are looked for at a time
MOST_STEPS = 1000  # of L-BFGS
Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)


class Separation(Measure):
    """The accuracy of k nearest neighbours by cosine, and of a linear probe, over the images of all processes.

    Attributes:
        probing: whether the probe is trained, too.
    """

    full_state_update = False
    bank: list[Tensor]
    bank_labels: list[Tensor]
    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.probing = False
        for name in ("bank", "bank_labels", "features", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, bank: bool = False) -> None:
        """Keep features (N, C) and labels (N,), of the images to measure on or of the bank to learn from."""
        held = (self.bank, self.bank_labels) if bank else (self.features, self.labels)
        held[0].append(features.detach().float())
        held[1].append(labels)

    def compute(self) -> dict[str, Tensor]:
        """The accuracies by name."""
        bank, bank_labels, features, labels = (
            dim_zero_cat(each) for each in (self.bank, self.bank_labels, self.features, self.labels)
        )
        found = {KNN.name: (neighbour_classes(bank, bank_labels, features)[0] == labels).float().mean()}
        if self.probing:
            found[PROBE.name] = (probed_classes(bank, bank_labels, features) == labels).float().mean()
        return found


def neighbour_classes(
    bank: Tensor, bank_labels: Tensor, features: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[Tensor, Tensor]:
    """The class that most of the nearest neighbours have, by cosine, and how many these are; of equals the first.

    Args:
        bank: features (M, C) among which they are looked for.
        bank_labels: of these (M,).
        features: of the images (N, C).
        neighbours: how many; all, if there are fewer.

    Returns:
        Labels (N,) and counts (N,).

    Examples:
        >>> bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> neighbour_classes(bank, torch.tensor([0, 0, 1]), torch.tensor([[2.0, 1.0]]), neighbours=2)
        (tensor([0]), tensor([2]))
    """
    bank = F.normalize(bank)
    classes = int(bank_labels.max()) + 1
    found = []
    for part in torch.split(F.normalize(features), CHUNK):
        nearest = (part @ bank.T).topk(min(neighbours, len(bank))).indices
        found.append(F.one_hot(bank_labels[nearest], classes).sum(1).max(1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def probed_classes(bank: Tensor, bank_labels: Tensor, features: Tensor) -> Tensor:
    """The classes (N,) that a logistic regression on standardised features gives.

    Args:
        bank: features (M, C) that it learns from.
        bank_labels: of these (M,).
        features: of the images (N, C).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if (bank_labels == bank_labels[0]).all():
        return bank_labels[:1].expand(len(features))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_STEPS))
    probe.fit(bank.cpu().numpy(), bank_labels.cpu().numpy())
    return torch.from_numpy(probe.predict(features.cpu().numpy())).to(features.device)


class SeparatingModule(DistilledModule):
    """Trains a student without labels and, where there are some, measures how well pooled outputs tell the classes apart.

    Of its measures, with labels both are a `Separation`. Its data is `UnlabelledData`.

    Attributes:
        labelled: whether the labels say anything.
    """

    labelled: bool

    def pooled(self, network: nn.Module, images: Tensor) -> Tensor:
        """The pooled output (N, C) of the student or the teacher, in 32 bits, for images (N, 3, H, W)."""
        raise NotImplementedError

    def one_image(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The first image, a batch (1, 3, H, W)."""
        return batch[0][:1]

    def gallery(self, batch: tuple[Tensor, ...], class_names: list[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The images, and of each what the nearest training images of "student" and "teacher" say.

        With labels these are the class "truth", and the one that most neighbours have; else the nearest one itself.
        """
        images, labels = batch[0], batch[1]
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        told: list[dict[str, Any]] = [
            {"truth": class_names[label]} if self.labelled else {} for label in labels.tolist()
        ]
        for role, network in (("student", self.network()), ("teacher", self.teacher)):
            if network is not None:
                found = self._told(network, images, class_names) if self.labelled else self._nearest(network, images)
                for own, each in zip(told, found, strict=True):
                    own[role] = each
        return list(data.preparation.pixels(images)), told

    def _told(self, network: nn.Module, images: Tensor, class_names: list[str]) -> list[str]:
        """The class that most of the nearest training images of each image have."""
        bank, bank_labels = (torch.cat(each) for each in list(zip(*self._bank(network), strict=True))[1:])
        classes, counts = neighbour_classes(bank, bank_labels, self.pooled(network, images))
        of = min(NEIGHBOURS, len(bank))
        return [
            f"{class_names[label]} ({count} of {of})" for label, count in zip(classes, counts.tolist(), strict=True)
        ]

    def _nearest(self, network: nn.Module, images: Tensor) -> list[Picture]:
        """The training image that each image (N, 3, H, W) is most like by the cosine of their pooled outputs."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        own, found = F.normalize(self.pooled(network, images)), torch.zeros_like(images)
        nearest = own.new_full((len(own),), -torch.inf)
        for others, features, _ in self._bank(network):
            cosines, at = (own @ F.normalize(features).T).max(1)
            closer = cosines > nearest
            found[closer], nearest[closer] = others[at[closer]], cosines[closer]
        pixels = data.preparation.pixels(found)
        return [
            Picture(each, f"nearest training image, cosine {cosine:.2f}")
            for each, cosine in zip(pixels, nearest.tolist(), strict=True)
        ]

    def _bank(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's images to measure by, their pooled outputs (N, C) and their labels, in batches."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for batch in data.bank_dataloader():
            images, labels = self.on_after_batch_transfer(self.transfer_batch_to_device(batch, self.device, 0), 0)
            with self.trainer.precision_plugin.forward_context(), torch.no_grad():
                features = self.pooled(network, images)
            yield images, features, labels

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Any:
        """The images in the networks' memory format."""
        return tuple(value.to(memory_format=self.memory_format) if value.ndim == 4 else value for value in batch)

    def check_output(self, output: Tensor) -> None:
        """See that the student's pooled output is finite."""
        self.check_finite({"the student's pooled output": output.detach().float().abs().amax()})

    def on_validation_epoch_start(self) -> None:
        """Fill the banks that pooled outputs are measured by."""
        if not self.labelled:
            return
        fitting = self.trainer.state.fn == "fit"
        last = self.current_epoch + 1 == self.schedule.all_epochs
        often = self.schedule.keep_best or self.schedule.stop_after is not None  # any epoch's student may be the result
        for measure, network in zip(self.measures, (self.network(), self.unmeasured_teacher()), strict=True):
            if network is not None:
                assert isinstance(measure, Separation)
                measure.probing = last or often or not fitting or network is self.teacher
                for _, features, labels in self._bank(network):
                    measure.update(features, labels, bank=True)

    def measure_neighbours(self, measure: Any, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take the pooled outputs of a network for labelled images."""
        output = self.pooled(network, images)
        measure.update(output, labels)
        if network is self.network() and self.trainer.state.fn == "fit":
            self.check_output(output)

    def unmeasured_teacher(self) -> nn.Module | None:
        """The teacher, as long as it has not been measured, which it is by labels alone."""
        return super().unmeasured_teacher() if self.labelled else None

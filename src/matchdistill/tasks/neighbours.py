"""How well features tell classes apart, with no head on them: by nearest neighbours, and by a linear probe.

Axes: N images, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric as Measure
from torchmetrics.utilities.data import dim_zero_cat

from matchdistill.tasks.metric import Metric

KNN, PROBE = Metric("knn", "20-NN"), Metric("probe", "linear probe")
NEIGHBOURS = 20
CHUNK = 1024  # images whose neighbours are looked for at a time
MOST_STEPS = 1000  # of L-BFGS


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

"""The loss on labels: smoothed, mixed or weighted.

Axes: N batch, C classes, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.runs.training import Training


class LabelLoss(nn.Module):
    """What a student's logits cost by the labels of images, which can be mixed first.

    Args:
        training: how images are mixed, and the loss.
        labels: of all training images (M,), by which ``balanced`` classes weigh; None where they are not known.
        num_classes: how many there are.

    Raises:
        ValueError: weights of another number of classes.
    """

    weights: Tensor | None

    def __init__(self, training: Training, num_classes: int, labels: Tensor | None = None) -> None:
        super().__init__()
        self.kind, self.smoothing, self.num_classes = training.loss, training.label_smoothing, num_classes
        self.register_buffer("weights", _class_weights(training, num_classes, labels), persistent=False)
        self._mixer = None
        if training.mixup or training.cutmix:
            from timm.data.mixup import Mixup

            self._mixer = Mixup(  # type: ignore[no-untyped-call]
                training.mixup, training.cutmix, label_smoothing=training.label_smoothing, num_classes=num_classes
            )

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), mixed in place with one another by NumPy's random numbers, and their targets.

        Returns:
            The images, and the labels (N,) where nothing is mixed, else shares (N, C) of the classes, smoothed.
        """
        if self._mixer is None:
            return images, labels
        even = len(labels) // 2 * 2  # images are mixed in pairs: one that is left stays as it is
        targets = self._shares(labels)
        if even:
            targets = torch.cat([self._mixer(images[:even], labels[:even])[1], targets[even:]])
        return images, targets

    def _shares(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.num_classes) * (1 - self.smoothing) + self.smoothing / self.num_classes

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean over a batch, and with "bce" over the classes.

        Args:
            output: logits (N, C).
            targets: labels (N,), or shares (N, C).
        """
        if self.kind == "bce":
            shares = self._shares(targets) if targets.ndim == 1 else targets
            return F.binary_cross_entropy_with_logits(output, shares.to(output.dtype), self.weights)
        smoothing = self.smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(output, targets, self.weights, label_smoothing=smoothing)


def _class_weights(training: Training, num_classes: int, labels: Tensor | None) -> Tensor | None:
    given = training.class_weights
    if given is None:
        return None
    if given == "balanced":
        assert labels is not None
        counts = labels.bincount(minlength=num_classes).clamp(min=1)
        return len(labels) / (num_classes * counts.float())
    if len(given) != num_classes:
        raise ValueError(
            f"training.class_weights has {len(given)} numbers for {num_classes} classes: give one for each"
        )
    return torch.tensor(given, dtype=torch.float32)

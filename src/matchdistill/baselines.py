"""Other distillers of features, to compare with: the same taps, another loss.

Axes: N batch, Cs student channels, Ct teacher channels, * position axes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.functional import partial_loss
from matchdistill.losses import masked, squared
from matchdistill.norms import FeatureNorm
from matchdistill.position import FeaturePosition


class FitNetsPosition(FeaturePosition):
    """Squared distance of the activations, the student's behind a trained 1x1 convolution to the teacher's width.

    A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, section 2.2: the convolution is followed by the
    teacher's non-linearity. Here beside the task's loss, not before.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.adapter = nn.Linear(self.student_channels, self.teacher_channels)

    def loss(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The squared distance, a scalar."""
        student, teacher, mask = self.masked_maps(student, teacher.detach(), mask)
        adapted = _wide(_pointwise(self.adapter, masked(student, mask).relu()).relu())
        goal = _wide(teacher.relu())
        if mask is None:
            return F.mse_loss(adapted, goal, reduction=loss_reduction)
        return squared(adapted - goal, loss_reduction, mask)


class AttentionPosition(FeaturePosition):
    """Squared distance of the normalised maps of attention, the mean of squares over the activated channels.

    S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1. Of an image, a map is one
    value: "mean" is the mean over the images, so that it does not depend on resolution.
    """

    def loss(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The squared distance, a scalar."""
        student, teacher, mask = self.masked_maps(student, teacher.detach(), mask)
        maps, goal = (attention(masked(features, mask)) for features in (student, teacher))
        total = F.mse_loss(maps, goal, reduction="sum")
        return total / len(student) if loss_reduction == "mean" else total


def attention(features: Tensor) -> Tensor:
    """Maps of attention (N, P), of length 1 each, of features (N, C, *) before their activation."""
    return F.normalize(_wide(features).relu().square().mean(1).flatten(1))


class OverhaulPosition(FeaturePosition):
    """Partial distance, with margins, behind a trained 1x1 convolution and batch norm to the teacher's width.

    B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.margin_norm is None:
            raise ValueError(
                f"{self.name}: OFD takes its margins from a batch norm, and the teacher has none before it: give taps that "
                "have one, leave distillation.pooled out, or choose another method"
            )
        self.adapter = nn.Linear(self.student_channels, self.teacher_channels, bias=False)
        self.norm = FeatureNorm(self.teacher_channels)

    def loss(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The partial distance, a scalar; the norm's statistics count what the mask leaves out as zeros."""
        student, teacher, mask = self.masked_maps(student, teacher.detach(), mask)
        margin = self.teacher_margin().to(student.device)
        adapted = self.norm(_pointwise(self.adapter, masked(student, mask)))
        return partial_loss(adapted, teacher, margin, loss_reduction, mask)


def _wide(features: Tensor) -> Tensor:
    """In 32 bits at least, as `partial_loss` sums."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _pointwise(adapter: nn.Module, features: Tensor) -> Tensor:
    """A linear map of the channels of features (N, C, *)."""
    mapped: Tensor = adapter(features.movedim(1, -1))
    return mapped.movedim(-1, 1)

"""A position whose targets are an orthogonal map of all teacher channels, found in closed form.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, V values (images and positions), M student
channels, * position axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.distributed import from_rank_0
from matchdistill.functional import batchnorm_margin, orthogonal_map, wide
from matchdistill.losses import masked
from matchdistill.matching import FeatureSums, Matching, regret_of
from matchdistill.options import MatchingOptions
from matchdistill.refreshed import RefreshedPosition
from matchdistill.taps import Tap
from matchdistill.trace import Operation

ROUNDING = 1e-12  # the share of a channel's mean square that rounding may make of a variance of 0


class CovarianceSums(FeatureSums):
    """Means and covariances of student and teacher channels over all values; see `FeatureSums`."""

    def parts(self, student: Tensor, teacher: Tensor, mask: Tensor | None, images: int) -> list[Tensor]:
        """Products of student and teacher (Cs, Ct) and of the teacher's (Ct, Ct), sums, the student's squares, V."""
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            own, first, count = _centred(student, mask)
            others, second, _ = _centred(teacher, mask)
            both, products = ((values @ others.T).to(second) for values in (own, others))
            both.addr_(count * first, second)
            products.addr_(count * second, second)
            squares = own.square().sum(1) + count * first.square()
            return [both, products, count * first, count * second, squares, count]

    def shapes(self, students: int, teachers: int) -> list[tuple[int, ...]]:
        """(Cs, Ct), (Ct, Ct), (Cs,), (Ct,), (Cs,) and a number."""
        return [(students, teachers), (teachers, teachers), (students,), (teachers,), (students,), ()]

    def covariance(self) -> Tensor:
        """Of student and teacher channels (Cs, Ct), float64.

        Raises:
            ValueError: no image was seen.
        """
        self._check_seen()
        both, _, student, teacher, _, count = self._sums
        return both / count - torch.outer(student / count, teacher / count)

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of student (Cs,) and teacher channels (Ct,), 0 where rounding is all that varies.

        Raises:
            ValueError: no image was seen.
        """
        self._check_seen()
        _, products, student, teacher, squares, count = self._sums
        return _deviation(squares / count, student / count), _deviation(products.diagonal() / count, teacher / count)

    def of_targets(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (Cs,) of the targets that a map (Cs, Ct) makes."""
        self._check_seen()
        _, products, _, teacher, _, count = self._sums
        mean = rotation @ (teacher / count)
        return mean, _deviation(((rotation @ (products / count)) * rotation).sum(1), mean)

    def correlation(self, rotation: Tensor) -> Tensor:
        """Of student channels and the targets that a map (Cs, Ct) makes (Cs, Cs); 0 where one does not vary."""
        scale = torch.outer(self.deviations()[0], self.of_targets(rotation)[1])
        return (self.covariance() @ rotation.T / scale.masked_fill(scale == 0, torch.inf)).clamp(-1, 1)


def _deviation(squares: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations by mean squares (C,) and means (C,), 0 where rounding is all that varies."""
    variance = squares - mean.square()
    return variance.masked_fill(variance <= ROUNDING * squares, 0).sqrt()


def _centred(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values of (N, C, *) less their mean (C, V), in 32 bits at least; the mean (C,) and their number V, in 64.

    Products of differences in 32 bits say how channels vary where products of values would be a matter of rounding.
    """
    values = masked(features.detach(), mask)
    values = values.to(torch.promote_types(values.dtype, torch.float32)).transpose(0, 1).flatten(1)
    count = values.new_tensor(values.shape[1]) if mask is None else mask.sum()
    mean = values.sum(1) / count.clamp_min(1)
    values = values - (mean[:, None] if mask is None else mean[:, None] * mask.flatten())
    return values, mean.to(wide(values.device)), count.to(wide(values.device))


class AlignedPosition(RefreshedPosition):
    """A position whose targets are an orthogonal map of all teacher channels to the student's width.

    The assignment of Matching Guided Distillation chooses among permutations. This chooses among all matrices R (Cs, Ct)
    with R R' = I, which contain the permutations of sparse matching: the one whose targets R t are nearest to the student's
    features, by the singular value decomposition of their covariance (the orthogonal Procrustes problem, P. Schoenemann,
    Psychometrika 1966). Margins are the ones of Normal targets with their measured mean and deviation.

    Attributes:
        rotation: the map R (Cs, Ct), zeros before the first refresh. Where the teacher is narrower, R' R = I.
    """

    partners = "targets"
    first_members = "heaviest"

    rotation: Tensor

    def __init__(
        self,
        teacher: Tap,
        student: Tap,
        values: tuple[Operation, Operation],
        margin_norm: tuple[str, nn.Module] | None,
        options: MatchingOptions,
    ) -> None:
        super().__init__(teacher, student, values, None, options)  # margins are the targets', not the norm's
        self.register_buffer("rotation", torch.zeros(self.student_channels, self.teacher_channels))

    @property
    def has_matching(self) -> bool:
        """Whether a refresh, or a loaded state, has found the map."""
        return bool(self.rotation.any())

    @property
    def group_size(self) -> int:
        """Ct: each target is made of all teacher channels."""
        return self.teacher_channels

    def target(self, teacher: Tensor) -> Tensor:
        """The targets (N, Cs, *) of the student's channels, from the teacher's (N, Ct, *)."""
        rotation = self.rotation.to(teacher.dtype)
        if teacher.ndim == 4:  # keeps the order of the axes in memory
            return F.conv2d(teacher, rotation[:, :, None, None])
        return F.linear(teacher.movedim(1, -1), rotation).movedim(-1, 1)

    def accumulator(self) -> CovarianceSums:
        """What adds up covariances for `solve`."""
        return CovarianceSums()

    def solve(self, sums: CovarianceSums) -> Matching:
        """Find the map by the summed covariances, and the margins of its targets.

        Raises:
            ValueError: features that are not finite; the position is named.
        """
        rotation = from_rank_0(self._map(sums))
        before, changed = self.rotation.to(rotation), None
        if self.has_matching:
            changed = float(1 - (before * rotation).sum() / min(rotation.shape)) / 2
        mean, deviation = sums.of_targets(rotation)
        self.rotation.copy_(rotation)
        self.margin.copy_(from_rank_0(batchnorm_margin(deviation, mean)))
        self.matching = self._told(sums, rotation, changed)
        return self.matching

    def regret(self, halves: Sequence[CovarianceSums]) -> float:
        """What a map lacks that has seen half of the images: see `matching.regret_of`."""
        maps = [self._map(half) for half in halves]
        own, swapped = (
            sum(float(1 - self._explained(half, rotation)) for half, rotation in zip(halves, order, strict=True))
            for order in (maps, maps[::-1])
        )
        return regret_of(own, swapped)

    def found(self, sums: CovarianceSums) -> Matching:
        """How well the targets of the map in force fit the images of the sums."""
        return self._told(sums, self.rotation.to(wide(self.rotation.device)), None)

    def members(self, channels: Tensor, fit: Matching, most: int) -> Tensor:
        """The teacher channels that weigh most in the targets of student channels."""
        weights = self.rotation[channels].abs()
        return weights.topk(min(most, weights.shape[1]), 1).indices

    def _map(self, sums: CovarianceSums) -> Tensor:
        covariance = sums.covariance()
        if not covariance.isfinite().all():
            raise ValueError(
                f"position {self.name}: the covariance of student and teacher channels is not finite: the features must be "
                "finite (check the networks' weights and input)"
            )
        return orthogonal_map(covariance)

    def _explained(self, sums: CovarianceSums, rotation: Tensor) -> Tensor:
        """Mean correlation of the student's channels with their targets."""
        return sums.correlation(rotation).diagonal().mean()

    def _told(self, sums: CovarianceSums, rotation: Tensor, changed: float | None) -> Matching:
        """What is shown: each student channel is paired with its own target, at a cost of 2 - 2 times their correlation."""
        cost = 2 - 2 * sums.correlation(rotation)
        return Matching(
            self.name, torch.arange(len(cost), device=cost.device)[:, None], cost.float(), sums.images, changed
        )

    def extra_repr(self) -> str:
        """Taps, widths and map sizes."""
        return f"{super().extra_repr()}, aligned"

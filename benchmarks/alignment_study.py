"""What makes the alignment of channels better: one change at a time, as in `transfer_study.py`.

A variant changes the recipe, the code, or both; it is compared with MGD, "every 2". Accuracies are of the first 3,000 test
images, which no recipe reports, unless data.val_part says otherwise. Runs of one seed have the same student and images, so
that differences are paired by seed; ± is half of their 95% interval.

    python -m benchmarks.alignment_study --out runs/alignment --seeds 100 101 102 --jobs 2 [-- VARIANT ...]

Axes: Cs student channels, Ct teacher channels, G group, V values (images and positions), * position axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.transfer_study import VARIANTS, main
from matchdistill import refreshed
from matchdistill.aligned import AlignedPosition, CovarianceSums
from matchdistill.functional import orthogonal_map, solve_assignment
from matchdistill.losses import sum_or_mean

Solve = Callable[[AlignedPosition, CovarianceSums], Tensor]


def solved(solve: Solve) -> Callable[[], None]:
    """The map (Cs, Ct) is found in another way."""

    def patch() -> None:
        AlignedPosition._map = solve

    return patch


def deviations(sums: CovarianceSums) -> tuple[Tensor, Tensor]:
    """Standard deviations of student (Cs,) and teacher channels (Ct,); infinite where a channel does not vary."""
    _, products, student, teacher, squares, count = sums._sums
    found = (
        (total / count - (mean / count).square()).clamp_min(0).sqrt()
        for total, mean in ((squares, student), (products.diagonal(), teacher))
    )
    first, second = (each.masked_fill(each == 0, torch.inf) for each in found)
    return first, second


def standardised(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Of channels of variance 1: the targets are maps of standardised teacher channels."""
    student, teacher = deviations(sums)
    return orthogonal_map(sums.covariance() / torch.outer(student, teacher)) / teacher


def found_standardised(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """The map is the one of standardised channels, the targets are maps of the teacher's channels as they are."""
    return orthogonal_map(sums.covariance() / torch.outer(*deviations(sums)))


def of_equal_students(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Student channels have variance 1, as behind the student-side norm; the teacher's are as they are."""
    return orthogonal_map(sums.covariance() / deviations(sums)[0][:, None])


def within_components(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Inside the teacher's first Cs principal components."""
    covariance = sums.covariance()
    _, products, _, teacher, _, count = sums._sums
    mean = teacher / count
    _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    first = vectors[:, -min(covariance.shape) :]
    return orthogonal_map(covariance @ first) @ first.T


def in_groups(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Groups are assigned by correlation; each target is the nearest direction within its group."""
    covariance = sums.covariance()
    correlation = covariance / torch.outer(*deviations(sums))
    index = solve_assignment(-correlation.abs())
    own = torch.zeros_like(covariance).scatter(1, index, covariance.gather(1, index))
    return F.normalize(own, dim=1)


def random(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """A random map, the same at every refresh: what the alignment is worth."""
    generator = torch.Generator().manual_seed(position.student_channels * 10_007 + position.teacher_channels)
    return orthogonal_map(torch.randn(position.rotation.shape, generator=generator, dtype=torch.float64))


def averaged(memory: float) -> Solve:
    """Covariances are averaged over the refreshes, exponentially: the map moves slowly."""

    def solve(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
        covariance = sums.covariance()
        before = position.__dict__.get("average", covariance)
        position.__dict__["average"] = average = memory * before + (1 - memory) * covariance
        return orthogonal_map(average)

    return solve


def squared() -> None:
    """All of the squared difference counts, not a part of it."""

    def loss(student: Tensor, target: Tensor, margin: Tensor, reduction: Any, mask: Tensor | None) -> Tensor:
        return sum_or_mean((student - target.detach()).square().sum(), student, reduction, mask)

    refreshed.partial_loss = loss


def without_margins() -> None:
    """The target is nowhere raised to a margin."""
    solve = AlignedPosition.solve

    def wrapped(self: AlignedPosition, sums: CovarianceSums) -> Any:
        found = solve(self, sums)
        self.margin.fill_(-1e30)
        return found

    AlignedPosition.solve = wrapped


def norm_like_target() -> None:
    """The student-side norm starts with the mean and the deviation of the targets."""
    solve = AlignedPosition.solve

    def wrapped(self: AlignedPosition, sums: CovarianceSums) -> Any:
        first, found = not self.has_matching, solve(self, sums)
        if first:
            mean, deviation = sums.of_targets(self.rotation.double())
            self.norm.weight.data.copy_(deviation)
            self.norm.bias.data.copy_(mean)
        return found

    AlignedPosition.solve = wrapped


def align(**changes: Any) -> dict[str, Any]:
    return {"method": "mgd-align", **changes}


ALIGNMENTS: dict[str, tuple[dict[str, Any], Callable[[], None] | None]] = {
    "align": (align(), None),
    **{f"align {w:g}": (align(**{"weights__mgd-align": w}), None) for w in (1.0, 2.0, 10.0, 20.0)},
    "align once": (align(refresh_every=0), None),
    "align every 1": (align(refresh_every=1), None),
    "align standardised": (align(), solved(standardised)),
    "align found standardised": (align(), solved(found_standardised)),
    "align of equal students": (align(), solved(of_equal_students)),
    "align within components": (align(), solved(within_components)),
    "align in groups": (align(), solved(in_groups)),
    "align random": (align(refresh_every=0), solved(random)),
    "align averaged 0.5": (align(), solved(averaged(0.5))),
    "align squared": (align(), squared),
    "align without margins": (align(), without_margins),
    "align norm like target": (align(), norm_like_target),
    **{f"align norm like target {w:g}": (align(**{"weights__mgd-align": w}), norm_like_target) for w in (1.0, 20.0)},
    "align+kd": (align(method="mgd-align+kd"), None),
}

# In every process: the ones that train import this module, too.
VARIANTS.update(ALIGNMENTS)

if __name__ == "__main__":
    main("python -m benchmarks.alignment_study", __doc__ or "")

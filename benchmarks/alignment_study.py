"""What makes the alignment of channels better: one change at a time, as in `transfer_study.py`.

A variant changes the recipe, the code, or both; it is compared with MGD, "every 2". Accuracies are of the first 3,000 test
images, which no recipe reports, unless data.val_part says otherwise. Runs of one seed have the same student and images, so
that differences are paired by seed; ± is half of their 95% interval.

    python -m benchmarks.alignment_study --out runs/alignment --seeds 100 101 102 --jobs 2 [-- VARIANT ...]

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, V values (images and positions),
* position axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.explained import moments, of_all
from benchmarks.transfer_study import VARIANTS, decaying, main
from matchdistill import refreshed
from matchdistill.aligned import AlignedPosition, CovarianceSums
from matchdistill.baselines import OverhaulPosition
from matchdistill.capture import Capture
from matchdistill.distiller import MatchingDistiller
from matchdistill.functional import empirical_margin, orthogonal_map, solve_assignment
from matchdistill.losses import sum_or_mean
from matchdistill.probing import evaluating
from matchdistill.runs.recipe import load_recipe
from matchdistill.taps import Tap
from matchdistill.tasks.classification.module import ClassificationModule

TRANSFER = "transfer_fashion_mnist"
IMAGES = 1000  # that adapters in closed form are fitted on
Solve = Callable[[AlignedPosition, CovarianceSums], Tensor]


def solved(solve: Solve) -> Callable[[], None]:
    """The map (Cs, Ct) is found in another way."""

    def patch() -> None:
        AlignedPosition._map = solve

    return patch


def correlations(sums: CovarianceSums) -> Tensor:
    """Of student and teacher channels (Cs, Ct), 0 where one does not vary."""
    scale = torch.outer(*sums.deviations())
    return sums.covariance() / scale.masked_fill(scale == 0, torch.inf)


def standardised(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Of channels of variance 1: the targets are maps of standardised teacher channels."""
    teacher = sums.deviations()[1]
    return orthogonal_map(correlations(sums)) / teacher.masked_fill(teacher == 0, torch.inf)


def found_standardised(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """The map is the one of standardised channels, the targets are maps of the teacher's channels as they are."""
    return orthogonal_map(correlations(sums))


def of_equal_students(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """Student channels have variance 1, as behind the student-side norm; the teacher's are as they are."""
    student = sums.deviations()[0]
    return orthogonal_map(sums.covariance() / student.masked_fill(student == 0, torch.inf)[:, None])


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
    index = solve_assignment(-correlations(sums).abs())
    own = torch.zeros_like(covariance).scatter(1, index, covariance.gather(1, index))
    return F.normalize(own, dim=1)


def in_positive_groups(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
    """As `in_groups`, with no negative weight: what is negative in a teacher channel is negative in its target, too."""
    covariance = sums.covariance().clamp_min(0)
    index = solve_assignment(-correlations(sums))
    return F.normalize(torch.zeros_like(covariance).scatter(1, index, covariance.gather(1, index)), dim=1)


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


def near_before(weight: float) -> Solve:
    """The nearest map to the one of the covariance and the one before: it moves slowly, and stays orthogonal."""

    def solve(position: AlignedPosition, sums: CovarianceSums) -> Tensor:
        found = orthogonal_map(sums.covariance())
        return orthogonal_map(found + weight * position.rotation.to(found)) if position.has_matching else found

    return solve


def found_on(change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """The map, not the loss, is of changed features (N, C, *)."""

    def patch() -> None:
        maps = AlignedPosition.maps

        def wrapped(self: AlignedPosition, student: Tensor, teacher: Tensor) -> Any:
            values = maps(self, student, teacher)
            return values if torch.is_grad_enabled() else tuple(map(change, values))  # a refresh has no gradients

        AlignedPosition.maps = wrapped

    return patch


def without_partial() -> None:
    """What is added to the loss is all of it."""
    AlignedPosition.loss = lambda self, student, *_: 0 * student.sum()


def with_relation(weight: float, distance: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """A distance of relations, of student (N, Cs, *), teacher (N, Ct, *) and target (N, Cs, *), is added to the loss."""

    def patch() -> None:
        loss = AlignedPosition.loss

        def wrapped(self: AlignedPosition, student: Tensor, teacher: Any, reduction: Any, mask: Any = None) -> Tensor:
            first, second = self.maps(student, teacher.detach())
            own, others, target = (values.transpose(0, 1).flatten(1) for values in (first, second, self.target(second)))
            return loss(self, student, teacher, reduction, mask) + weight * distance(own, others, target)

        AlignedPosition.loss = wrapped
        # The teacher's features are needed, not the reduced ones.
        AlignedPosition.reduces_early = property(lambda self: False)

    return patch


def cka(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """1 less the linear centred kernel alignment of values (C, V) (Kornblith et al., ICML 2019, section 3)."""
    first, second = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    own, others = (torch.linalg.norm(values @ values.T) for values in (first, second))
    return 1 - torch.linalg.norm(first @ second.T).square() / (own * others).clamp_min(1e-12)


def channels_apart(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of the correlations of the student's channels and of the targets', values (Cs, V)."""
    own, others = (F.normalize(values - values.mean(1, keepdim=True), dim=1, eps=1e-3) for values in (student, target))
    return (own @ own.T - others @ others.T).square().mean()


def pearson() -> None:
    """1 less the correlation of each channel with its target, in place of the norm and of the partial loss."""

    def loss(self: AlignedPosition, student: Tensor, teacher: Any, reduction: Any, mask: Any = None) -> Tensor:
        first, second = self.maps(student, teacher.detach())
        both = [values.transpose(0, 1).flatten(1) for values in (first, self.target(second))]
        own, others = (values - values.mean(1, keepdim=True) for values in both)
        return 1 - F.cosine_similarity(own, others, dim=1, eps=1e-6).mean()

    AlignedPosition.loss = loss
    AlignedPosition.reduces_early = property(lambda self: False)


def measured_margins() -> None:
    """Margins are the means of the targets' negative values in the batch."""

    def arguments(self: AlignedPosition, *values: Any) -> Any:
        student, target, _, mask = given(self, *values)
        return student, target, empirical_margin(target), mask

    given, AlignedPosition.loss_arguments = AlignedPosition.loss_arguments, arguments


def weighted() -> None:
    """Each position's loss is weighted by the mean correlation of the student's channels with their targets."""
    solve, loss = AlignedPosition.solve, AlignedPosition.loss

    def solved(self: AlignedPosition, sums: CovarianceSums) -> Any:
        found = solve(self, sums)
        self.__dict__["alignment"] = float(1 - found.cost.diagonal().mean() / 2)
        return found

    def wrapped(self: AlignedPosition, *values: Any) -> Tensor:
        return self.__dict__["alignment"] * loss(self, *values)

    AlignedPosition.solve, AlignedPosition.loss = solved, wrapped


def stages_by_cka() -> None:
    """The teacher's layers are the ones whose kernels are most like the student's, and not the ones of equal size.

    For the transfer recipe: of all batch norms of the teacher whose values the student's are compared with, the best ones
    in order of depth, by 256 training images and the untrained student.
    """
    build = MatchingDistiller.__init__

    def wrapped(self: MatchingDistiller, teacher: nn.Module, student: nn.Module, *args: Any, **options: Any) -> None:
        build(self, teacher, student, *args, **options)
        own = [str(position.student) for position in self.positions]
        others = [f"{name}:output" for name, _ in teacher.named_modules() if name.endswith("_bn0")]
        others += [tap for tap in [str(self.positions[-1].teacher)] if tap not in others]
        self.release()
        images = torch.cat([images for images, _ in load_recipe(TRANSFER).data.refresh_dataloader(256, 0)])
        first, second = (tapped(network, taps, images) for network, taps in ((teacher, others), (student, own)))
        alike = [[alignment_of_maps(one, two) for one in first] for two in second]
        chosen = max(
            itertools.combinations(range(len(others)), len(own)),
            key=lambda columns: sum(row[column] for row, column in zip(alike, columns, strict=True)),
        )
        taps = [(others[column], tap) for column, tap in zip(chosen, own, strict=True)]
        print(taps, flush=True)
        build(self, teacher, student, taps, **options)

    MatchingDistiller.__init__ = wrapped


@torch.no_grad()
def tapped(network: nn.Module, taps: list[str], images: Tensor) -> list[Tensor]:
    """The values (N, C, H, W) of a network in evaluation at taps."""
    capture = Capture(network, [Tap.parse(tap) for tap in taps])
    with evaluating(network), capture(alone=True) as captured:
        network(images)
    capture.remove()
    return [captured.values[number] for number in range(len(taps))]


def alignment_of_maps(teacher: Tensor, student: Tensor) -> float:
    """The linear centred kernel alignment of maps (N, C, H, W), at the student's size."""
    values = F.adaptive_avg_pool2d(teacher, student.shape[2:]), student
    one, other = (each.transpose(0, 1).flatten(1).double() for each in values)
    return 1 - float(cka(other, one, one))


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


def in_closed_form(trained: bool = True) -> Callable[[], None]:
    """OFD's adapters start as the ridge regression of the teacher's channels on the student's before its training."""

    def patch() -> None:
        begin = ClassificationModule.on_train_epoch_start

        def wrapped(self: ClassificationModule) -> None:
            begin(self)
            if self.current_epoch:
                return
            assert self.distiller is not None
            loader = self.trainer.datamodule.refresh_dataloader(IMAGES, 0)  # type: ignore[attr-defined]
            for position, mean in zip(self.distiller.positions, moments(self.distiller, loader), strict=True):
                assert isinstance(position, OverhaulPosition)
                students = position.student_channels
                weights = of_all(mean, students)[:students]  # (Cs, Ct); the last row is the shift, which the norm takes
                own = mean[students, :students]
                within = mean[:students, :students] - torch.outer(own, own)
                position.adapter.weight.data.copy_(weights.T)
                position.norm.weight.data.copy_(((weights.T @ within) * weights.T).sum(1).clamp_min(0).sqrt())
                position.norm.bias.data.copy_(mean[students, students + 1 :])
                position.adapter.requires_grad_(trained)

        ClassificationModule.on_train_epoch_start = wrapped

    return patch


def frozen_adapters() -> None:
    """OFD's adapters stay as they are drawn."""
    build = OverhaulPosition.__init__

    def wrapped(self: OverhaulPosition, *arguments: Any) -> None:
        build(self, *arguments)
        self.adapter.requires_grad_(False)

    OverhaulPosition.__init__ = wrapped


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
    "align in positive groups": (align(), solved(in_positive_groups)),
    "align near before": (align(), solved(near_before(1.0))),
    "align found on images' differences": (align(), found_on(lambda values: values - values.mean(0, keepdim=True))),
    "align found on places' differences": (align(), found_on(lambda v: v - v.flatten(2).mean(2)[:, :, None, None])),
    **{f"align with cka {w:g}": (align(), with_relation(w, cka)) for w in (0.1, 1.0)},
    **{f"align with channels {w:g}": (align(), with_relation(w, channels_apart)) for w in (0.1, 1.0)},
    "cka": (align(), lambda: (without_partial(), with_relation(1.0, cka)())),
    **{f"align pearson {w:g}": (align(**{"weights__mgd-align": w}), pearson) for w in (0.3, 1.0, 5.0)},
    "align measured margins": (align(), measured_margins),
    "align weighted": (align(), weighted),
    "align stages by cka": (align(), stages_by_cka),
    "align early": (align(refresh_every=[0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]), None),
    "align linear decay": (align(), decaying(lambda done: 1 - done)),
    "align linear decay of 10": (align(**{"weights__mgd-align": 10.0}), decaying(lambda done: 1 - done)),
    **{f"align+kd {t:g}": (align(method="mgd-align+kd", kd_temperature=t), None) for t in (4.0, 8.0)},
    "align random": (align(refresh_every=0), solved(random)),
    "align averaged 0.5": (align(), solved(averaged(0.5))),
    "align squared": (align(), squared),
    "align without margins": (align(), without_margins),
    "align norm like target": (align(), norm_like_target),
    **{f"align norm like target {w:g}": (align(**{"weights__mgd-align": w}), norm_like_target) for w in (1.0, 20.0)},
    "align+kd": (align(method="mgd-align+kd"), None),
    **{
        f"ofd {w:g} {name}": ({"method": "ofd", "weights__ofd": w}, patch)
        for w in (5.0, 20.0)
        for name, patch in (
            ("in closed form", in_closed_form()),
            ("in closed form, frozen", in_closed_form(trained=False)),
            ("frozen", frozen_adapters),
        )
    },
}

# In every process: the ones that train import this module, too.
VARIANTS.update(ALIGNMENTS)

if __name__ == "__main__":
    main("python -m benchmarks.alignment_study", __doc__ or "")

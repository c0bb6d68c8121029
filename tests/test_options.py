"""The options of the distillers: names, ranges and defaults. What each does is tested where it acts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matchdistill import MatchingDistiller, Reduction
from matchdistill.features import FeatureDistiller
from matchdistill.options import FeatureOptions, MatchingOptions
from matchdistill.position import FeaturePosition
from matchdistill.reduction import REDUCTIONS
from networks import PLAIN_TAPS, Plain
from test_distiller import images, networks


@pytest.mark.parametrize("options", [FeatureOptions, MatchingOptions])
def test_an_unknown_option_is_a_type_error_that_suggests_a_known_one(options: type[FeatureOptions]) -> None:
    with pytest.raises(TypeError, match="there is no option 'los_weight'; did you mean 'loss_weight'"):
        options.of(los_weight=1.0)
    with pytest.raises(TypeError, match="there is no option 'zzz': expected taps, loss_weight, example"):
        options.of(zzz=1.0)


def test_the_distillers_refuse_unknown_options() -> None:
    with pytest.raises(TypeError, match="there is no option 'hysterese'; did you mean 'hysteresis'"):
        MatchingDistiller(*networks(), hysterese=0.1)
    with pytest.raises(TypeError, match="there is no option 'hysteresis': expected"):
        FeatureDistiller(*networks(), PLAIN_TAPS, FeaturePosition, hysteresis=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": "all"}, "taps='all': expected 'auto'"),
        ({"taps": 3}, "taps=3: expected 'auto'"),
        ({"loss_reduction": "total"}, "loss_reduction='total': expected 'mean' or 'sum'"),
        ({"online": 0.5}, "online=0.5: expected a number of steps"),
        ({"hysteresis": -1.0}, "hysteresis=-1.0: expected a finite number of at least 0"),
        ({"reduction": "mix"}, "unknown reduction 'mix'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingOptions.of(**options)


def test_the_paper_has_sums() -> None:
    assert MatchingOptions(loss_weight="paper", loss_reduction="mean").applied_loss_reduction == "sum"
    assert MatchingOptions(loss_weight="paper").weights(2) == [1 / 2e4, 1 / 1e4]
    assert MatchingOptions(loss_reduction="mean").applied_loss_reduction == "mean"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_reduction_and_a_method_from_outside(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """By an entry in the table, and by a class."""
    seen = []

    def last(teacher: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return teacher[:, index[:, -1]]

    toy = Reduction(last, lambda margins, _: margins[:, -1], deterministic=deterministic)
    monkeypatch.setitem(REDUCTIONS, "toy", toy)
    distiller = MatchingDistiller(*networks(), PLAIN_TAPS, "toy", example=images())
    distiller.refresh([images()])
    with distiller.capture(images()) as captured:
        assert len(seen) == 3 * deterministic  # while the teacher runs
        distiller.student(images())
    assert distiller.loss(captured) > 0
    assert seen == [False] * 3

    class Difference(FeaturePosition):
        def loss(self, student: Tensor, teacher: Tensor, loss_reduction: Any, mask: Tensor | None = None) -> Tensor:
            student, teacher = self.maps(student, teacher)
            return nn.functional.l1_loss(student, teacher, reduction=loss_reduction)

    other = FeatureDistiller(Plain(4), Plain(4), PLAIN_TAPS, Difference, example=images())
    _, loss = other(images())
    loss.backward()
    assert loss > 0

"""The options of the distillers: what each means, its default and its check.

Axes: B batch size, Cs student channels, Ct teacher channels, G group.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from matchdistill.functional import solve_assignment
from matchdistill.messages import did_you_mean
from matchdistill.norms import FeatureNorm
from matchdistill.prepare import Prepare
from matchdistill.reduction import ALIGN, Reduction, get_reduction
from matchdistill.taps import Tap

Matcher = Callable[[Tensor, int], Tensor]
Taps = Literal["auto"] | Sequence[tuple[Tap | str, Tap | str]]

Options = TypeVar("Options", bound="FeatureOptions")

PAPER_FACTOR = 1e4  # of the summed losses at 224 px (MGD, section 4.1)


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options of every distiller of features.

    Attributes:
        taps: "auto" (see `find_taps`), or pairs (teacher tap, student tap) from shallow to deep, each a `Tap` or its text
            "path:input" / "path:output" / "path". Positions that you leave out are not guided.
        loss_weight: weight of each position's loss, one number for all or one for each. "paper" is the paper's form: the
            sum over all elements, divided by ``B * 1e4 * 2 ** (n - 1 - i)`` for batch size B and position i of n. It is
            made for 224 px, where it equals 5 times the mean for MobileNet-V1.
        example: an input to find taps and sizes with; None: images of the size that the networks ask for.
        loss_reduction: "mean" over the elements, or "sum" over the elements of an image, averaged over the batch. The
            paper's form for detectors with four positions is "sum" with ``loss_weight=[2e-8, 2e-8, 2e-7, 2e-7]``.
        prepare: makes a faster copy of the teacher, which runs in its place. It is given the copy and what can be folded
            in it: `prepare.prepared`, in a `functools.partial` for other types and compilation, or `engine.on_onnxruntime`.
            Weights that are loaded into the teacher later take effect; in a distiller that is compiled as a whole, at the
            next refresh. None: the teacher itself runs.

    Raises:
        TypeError: from `of`, an unknown option.
        ValueError: a value that is out of range.
    """

    taps: Taps = "auto"
    loss_weight: float | Sequence[float] | Literal["paper"] = 1.0
    example: Tensor | tuple[Any, ...] | None = None
    loss_reduction: Literal["mean", "sum"] = "mean"
    prepare: Prepare | None = None

    @classmethod
    def of(cls: type[Options], **given: Any) -> Options:
        """The options of these names; an unknown one is a TypeError that suggests a known one.

        Examples:
            >>> FeatureOptions.of(los_weight=2.0)
            Traceback (most recent call last):
            TypeError: there is no option 'los_weight'; did you mean 'loss_weight'?
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) or f": expected {', '.join(known)}"
                raise TypeError(f"there is no option {name!r}{hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        if not isinstance(self.taps, Iterable) or (isinstance(self.taps, str) and self.taps != "auto"):
            raise ValueError(f"taps={self.taps!r}: expected 'auto' or a sequence of (teacher tap, student tap)")
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={self.loss_reduction!r}: expected 'mean' or 'sum'")

    def pairs(self) -> list[tuple[Tap, Tap]] | None:
        """The given taps; a pair from YAML is a list. None: they are to be found.

        Raises:
            ValueError: no pairs of taps, or none at all.
        """
        if self.taps == "auto":
            return None
        pairs: list[tuple[Tap, Tap]] = []
        for pair in self.taps:
            if (
                not isinstance(pair, (tuple, list))
                or len(pair) != 2
                or not all(isinstance(tap, (Tap, str)) for tap in pair)
            ):
                raise ValueError(
                    f"{pair!r} in taps: expected a pair (teacher tap, student tap), each a Tap or its text"
                )
            first, second = (tap if isinstance(tap, Tap) else Tap.parse(tap) for tap in pair)
            pairs.append((first, second))
        if not pairs:
            raise ValueError("taps is empty: expected 'auto' or at least one (teacher tap, student tap)")
        return pairs

    @property
    def applied_loss_reduction(self) -> Literal["mean", "sum"]:
        """The loss reduction as given, or "sum", which the paper's weights are for."""
        return "sum" if self.loss_weight == "paper" else self.loss_reduction

    def weights(self, positions: int) -> list[float]:
        """The weight of each of so many positions.

        Raises:
            ValueError: weights that are no finite numbers of at least 0, or not one for each position.
        """
        given: Any = self.loss_weight
        if given == "paper":
            return [1 / (PAPER_FACTOR * 2 ** (positions - 1 - number)) for number in range(positions)]
        if isinstance(given, str):
            raise ValueError(f"loss_weight={given!r}: expected a number, a number for each position, or 'paper'")
        weights: list[Any] = list(given) if isinstance(given, Sequence) else [given] * positions
        if len(weights) != positions:
            raise ValueError(f"loss_weight has {len(weights)} numbers for {positions} positions: expected one for each")
        if not all(map(amount, weights)):
            raise ValueError(f"loss_weight={given!r}: expected finite numbers of at least 0, one for each position")
        return [float(weight) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class MatchingOptions(FeatureOptions):
    """Options of `MatchingDistiller`: these, and what `FeatureOptions` has, with a ``loss_weight`` of 5 by default.

    Attributes:
        reduction: "amp" (absolute max pooling), "rd" (random drop), "sm" (sparse matching, one to one), "max", "mean", or
            a `Reduction`; "align" maps all teacher channels by an orthogonal matrix instead of groups of them (see
            `aligned.AlignedPosition`). "rd" draws from torch's default generator, as dropout does.
        norm: builds the normalisation that student features pass, from the number of channels; default: batch norm.
            `norms.group_norm` is for small batches. The statistics of a masked batch count the padding as zeros.
        matcher: solves the matching, (cost (Cs, Ct), G) -> index (Cs, G); `random_assignment` is the control that ignores
            the cost.
        hysteresis: how much the cost of the pairs in force (0 alike, 2 unrelated) is lowered at a refresh, so that only
            changes that pay are made; the paper's is 0.
        online: a refresh without images uses the features of every so many training steps; 0: of none. It is an
            attribute of the distiller too, which may be changed. Not with DataParallel.

    Raises:
        TypeError: from `of`, an unknown option.
        ValueError: a value that is out of range.
    """

    loss_weight: float | Sequence[float] | Literal["paper"] = 5.0
    reduction: str | Reduction = "amp"
    norm: Callable[[int], nn.Module] = FeatureNorm
    matcher: Matcher = solve_assignment
    hysteresis: float = 0.0
    online: int = 0

    def __post_init__(self) -> None:
        if self.reduction != ALIGN:
            get_reduction(self.reduction)
        elif self.matcher is not solve_assignment or self.hysteresis:
            raise ValueError(f"reduction {ALIGN!r} assigns no channels: leave out matcher and hysteresis")
        super().__post_init__()
        if not isinstance(self.online, int) or self.online < 0:
            raise ValueError(f"online={self.online!r}: expected a number of steps, or 0")
        if not amount(self.hysteresis):
            raise ValueError(f"hysteresis={self.hysteresis}: expected a finite number of at least 0")

    def of_features(self) -> dict[str, Any]:
        """The options that every distiller of features has, by name."""
        return {field.name: getattr(self, field.name) for field in fields(FeatureOptions)}


def amount(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf

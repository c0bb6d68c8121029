"""The table of methods: what the student learns from its teacher, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from matchdistill.baselines import AttentionPosition, FitNetsPosition, OverhaulPosition
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.messages import did_you_mean
from matchdistill.options import Matcher
from matchdistill.position import FeaturePosition
from matchdistill.reduction import ALIGN, REDUCTIONS

Weight = float | list[float] | Literal["paper"]
KD = "kd"  # the name of the loss on the outputs
KD_WEIGHT = 1.0


@dataclass(frozen=True)
class FeatureMethod:
    """A way to learn from features.

    Attributes:
        learned: what the student learns from, in one sentence's end: "its attention maps". ``{reduction}`` stands for the
            name of the reduction.
        weight: of each position's loss, unless a recipe says otherwise.
        position: makes a position, given the arguments of `FeaturePosition`; None: it is matched.
        matcher: assigns teacher channels to student channels, where positions are matched.
        reduction: of the teacher's channels, where the method has one of its own. The full name of other methods that match
            ends in one, "mgd-amp".
        refreshes: whether the matching is solved anew in training.
        weighed_as: the method whose weight it has, where it is that one's control.
    """

    learned: str
    weight: float
    position: Callable[..., FeaturePosition] | None = None
    matcher: Matcher | None = None
    reduction: str | None = None
    refreshes: bool = True
    weighed_as: str | None = None

    @property
    def takes_reduction(self) -> bool:
        """Whether the method's full name ends in a reduction."""
        return self.matcher is not None and self.reduction is None


METHODS: dict[str, FeatureMethod] = {
    "mgd": FeatureMethod(
        "its features by Matching Guided Distillation (channels matched, reduced by `{reduction}`)",
        5.0,
        matcher=solve_assignment,
    ),
    "mgd-align": FeatureMethod(
        "its features through an orthogonal map of its channels, found in closed form",
        5.0,
        matcher=solve_assignment,
        reduction=ALIGN,
    ),
    "random": FeatureMethod(
        "its features by random groups of channels (reduced by `{reduction}`)",
        5.0,
        matcher=random_assignment,
        refreshes=False,
        weighed_as="mgd",
    ),
    "fitnets": FeatureMethod("its features through a trained adapter", 30.0, FitNetsPosition),
    "at": FeatureMethod("its attention maps", 10.0, AttentionPosition),
    "ofd": FeatureMethod("its features through a trained adapter, with margins", 20.0, OverhaulPosition),
}


class Method(NamedTuple):
    """What a method's full name says.

    Attributes:
        features: how features are distilled, a name of `METHODS`; None: they are not.
        reduction: of the matched channels, where it matches.
        kd: whether the output is distilled.
    """

    features: str | None = None
    reduction: str | None = None
    kd: bool = False

    @property
    def family(self) -> FeatureMethod | None:
        """The entry of `METHODS`; None where features are not distilled."""
        return None if self.features is None else METHODS[self.features]

    @property
    def learned(self) -> str:
        """What the student learns from beside labels, for a sentence that begins with what it does."""
        return self.learned_beside("labels")

    def learned_beside(self, beside: str) -> str:
        """What the student learns from, for a sentence that begins with what it does.

        Args:
            beside: what it learns from beside its teacher; empty: nothing.
        """
        taught = [] if self.family is None else [self.family.learned.format(reduction=self.reduction)]
        taught += ["its output"] if self.kd else []
        if not taught:
            return f"from {beside} alone" if beside else "nothing and is as it was given"
        return f"{f'from {beside}, and' if beside else 'without labels,'} of the teacher {' and '.join(taught)}"


def method_names() -> dict[str, Method]:
    """All methods by their full names."""
    known: dict[str, Method] = {}
    for name, family in METHODS.items():
        if not family.takes_reduction:
            known[name] = Method(name, family.reduction)
        else:
            known |= {f"{name}-{reduction}": Method(name, reduction) for reduction in REDUCTIONS}
    known |= {f"{name}+{KD}": own._replace(kd=True) for name, own in known.items()}
    return {"none": Method(), KD: Method(kd=True), **known}


def parse_method(method: str) -> Method:
    """What a method's full name says.

    Raises:
        ValueError: an unknown method.

    Examples:
        >>> parse_method("mgd-amp+kd")
        Method(features='mgd', reduction='amp', kd=True)
    """
    known = method_names()
    if method not in known:
        raise ValueError(f"unknown method {method!r}{did_you_mean(method, known)}: expected one of {', '.join(known)}")
    return known[method]


def default_weights() -> dict[str, Weight]:
    """The weight of every method that has its own, and of the loss on the outputs."""
    own = {name: family.weight for name, family in METHODS.items() if family.weighed_as is None}
    return {**own, KD: KD_WEIGHT}

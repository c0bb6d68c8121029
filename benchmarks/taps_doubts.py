"""What is doubtful about the taps of a pair: what an expert would look at.

Axes: N batch, C channels, T tokens, P positions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from benchmarks import reach, zoo
from benchmarks.reach import Value

MOST = 4  # stages, and positions
GUIDED = 0.95  # share of the body
RATIO = 1.5  # of positions; more is another resolution


@dataclass
class Side:
    """One network of a pair.

    Attributes:
        features: the values that its library names; what leads to them is its body.
        taps: the values that are tapped.
        weights: the number of values of each parameter.
        heads: expression for the paths of modules that are no part of the body.
    """

    features: list[Value]
    taps: list[Value]
    weights: dict[int, int]
    heads: str

    def __post_init__(self) -> None:
        self.ends = reach.last_of_each_size(self.features)
        self.body = frozenset().union(*(value.parameters for value in self.features))

    def count(self, parameters: frozenset[int]) -> int:
        """The number of their values."""
        return sum(self.weights[parameter] for parameter in parameters)

    @property
    def guided(self) -> float:
        """The share of the body that leads to a tap."""
        led = frozenset().union(*(tap.parameters for tap in self.taps))
        return self.count(self.body & led) / max(1, self.count(self.body))

    def depth(self, tap: Value) -> float:
        """The share of the body that leads to one tap."""
        return self.count(self.body & tap.parameters) / max(1, self.count(self.body))

    @property
    def most(self) -> int:
        """The most positions that it can have: its stages, or the features of its only one."""
        return min(MOST, len(self.ends) if len(self.ends) > 1 else len(self.features))

    def doubts(self) -> list[str]:
        """What an expert would look at in its taps."""
        flags = []
        deepest = {tap.positions: tap for tap in self.taps}  # the last of each size
        for before, tap in zip([None, *self.taps], self.taps, strict=False):
            if tap.shape[0] != zoo.BATCH:
                flags.append(f"{tap.name} has no batch axis {tap.shape}")
            beyond = self.count(tap.parameters - self.body) > 0.01 * self.count(self.body)
            if beyond and re.search(self.heads, tap.name.split(":")[0]):
                flags.append(f"{tap.name} in the head")
            elif beyond and self.ends and tap.positions > RATIO * self.ends[-1].positions:
                flags.append(f"{tap.name} in a decoder")
            if before is not None and self.count(before.parameters - tap.parameters) > 0.01 * self.count(self.body):
                flags.append(f"{tap.name} does not follow {before.name}")
            if len(self.ends) > 1 and deepest[tap.positions] is tap:
                flags += [f"{tap.name} {lack}" for lack in self.lacks(tap)]
        if len(self.ends) == 1:
            depths = [self.depth(tap) for tap in self.taps]
            steps = [after - before for before, after in zip([0.0, *depths], depths, strict=False)]
            if min(steps) < 0.05:
                flags.append("depths " + " ".join(f"{depth:.0%}" for depth in depths))
        return flags

    def lacks(self, tap: Value) -> list[str]:
        """The stages of its map size that the tap leaves out a tenth of."""
        found = []
        for before, end in zip([None, *self.ends], self.ends, strict=False):
            own = end.parameters - (before.parameters if before is not None else frozenset())
            share = self.count(own - tap.parameters) / max(1, self.count(own))
            if reach.same_size(tap, end) and share > 0.1:
                found.append(f"leaves out {share:.0%} of {end.name}")
        return found


def doubts(teacher: Side, student: Side) -> list[str]:
    """What an expert would look at in the taps of a pair."""
    flags = []
    if student.guided < GUIDED:
        flags.append(f"{1 - student.guided:.0%} of the body unguided")
    if len(student.taps) < (most := min(teacher.most, student.most)):
        flags.append(f"{len(student.taps)} positions of {most}")
    flags += [
        f"{role}: {flag}" for role, side in (("teacher", teacher), ("student", student)) for flag in side.doubts()
    ]
    for first, second in zip(teacher.taps, student.taps, strict=True):
        if len(teacher.ends) > 1 and len(student.ends) > 1:
            apart = octaves(first, second)
            nearest = min((octaves(end, second) for end in teacher.ends), default=apart)
            if apart > 0.8 and nearest < apart - 0.4:
                flags.append(f"{first.name} has {2**apart:.1f} times the stride of {second.name}")
        elif abs(teacher.depth(first) - student.depth(second)) > 0.3 and len(teacher.ends) == len(student.ends) == 1:
            flags.append(f"{first.name} is at {teacher.depth(first):.0%}, {second.name} at {student.depth(second):.0%}")
    return flags


def octaves(first: Value, second: Value) -> float:
    """How often the stride of one value has to be doubled to be the other's, along the axis of an image that differs most.

    Videos have their time first: how many frames a network leaves is its own choice.
    """
    if len(first.sizes) == len(second.sizes):
        return max(abs(math.log2(one / other)) for one, other in zip(first.sizes[-2:], second.sizes[-2:], strict=True))
    axes = max(len(first.sizes), len(second.sizes))
    return abs(math.log2(first.positions / second.positions)) / axes

"""What is measured of a network, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is.

    Attributes:
        name: in files and logs.
        label: for people.
        higher_is_better: whether the best value is the highest.
        share: whether it is shown in percent.
        of_images: whether it is the share of images that are right, so that chance is binomial.
        hub_type: what the Hub calls it; empty: its name.

    Examples:
        >>> Metric("top1", "top-1").shown(0.934), Metric("loss", "loss", share=False).shown(0.934)
        ('93.40%', '0.934')
    """

    name: str
    label: str
    higher_is_better: bool = True
    share: bool = True
    of_images: bool = False
    hub_type: str = ""

    def shown(self, value: float) -> str:
        """A value for people."""
        return f"{value:.2%}" if self.share else f"{value:.4g}"

    @property
    def scale(self) -> float:
        """What values are multiplied by where their unit stands elsewhere: shares are then in percent."""
        return 100.0 if self.share else 1.0

    def best(self, values: Iterable[float]) -> float:
        """The best of several values."""
        return max(values) if self.higher_is_better else min(values)

    def gap_recovered(self, alone: float, own: float, teacher: float) -> float | None:
        """The share of the distance from a student alone to its teacher that was made up; None where there is none."""
        if teacher == alone or self.best((alone, teacher)) == alone:
            return None
        return (own - alone) / (teacher - alone)


def metrics_in(metrics: Sequence[Metric], names: Iterable[str]) -> list[Metric]:
    """The metrics whose names are among the given ones, in their own order."""
    there = set(names)
    return [metric for metric in metrics if metric.name in there]

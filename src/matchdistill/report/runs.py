"""What lies in the folder of a run, finished or not, and in that of a comparison."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from matchdistill.files import read_json
from matchdistill.folder import CELLS, METRICS, RECIPE, read_metrics
from matchdistill.recipe import read_recipe
from matchdistill.report import evidence


class Point(NamedTuple):
    """A logged value."""

    step: int
    epoch: int
    value: float


Seen = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Run:
    """A run as far as it has come.

    Attributes:
        folder: where it is.
        name: what tells it from the others of a page.
        recipe: its values.
        metrics: None as long as it is not finished.
    """

    folder: Path
    name: str
    recipe: dict[str, Any] = field(repr=False)
    metrics: dict[str, Any] | None = field(repr=False)

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> Run:
        """The run in a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is no folder of a run: it has no {RECIPE}")
        run = cls(folder, name or folder.resolve().name, read_recipe(folder / RECIPE), read_metrics(folder))
        if name is None and run._cell:
            run.name = f"{folder.resolve().parent.name}, {run.name.replace('seed', 'seed ')}"
        return run

    @property
    def method(self) -> str:
        """The method of distillation."""
        return str((self.recipe.get("distillation") or {}).get("method", "none"))

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """What was logged, by name; of steps that were taken twice, as the run had been cut, the later ones."""
        rows: list[dict[str, str]] = []
        versions = (self.folder / "logs").glob("version_*/metrics.csv")
        for path in sorted(versions, key=lambda path: int(path.parent.name.partition("_")[2])):
            with path.open(newline="") as file:
                own = [row for row in csv.DictReader(file) if row.get("step") and row.get("epoch")]
            if own:
                begun = int(own[0]["step"])
                rows = [row for row in rows if int(row["step"]) < begun] + own
        found: dict[str, list[Point]] = {}
        for row in rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append(Point(int(row["step"]), int(row["epoch"]), float(value)))
        return found

    @cached_property
    def refreshes(self) -> list[dict[str, Any]]:
        """As of `evidence.read_refreshes`."""
        return evidence.read_refreshes(self.folder)

    @cached_property
    def matched(self) -> dict[str, Seen]:
        """The matchings "first", "last" and "final", the latter with the trained student's costs, as far as they are."""
        places = {"first": evidence.FIRST, "last": evidence.LAST, "final": evidence.FINAL}
        found = {name: evidence.load(self.folder / place) for name, place in places.items()}
        return {name: seen for name, seen in found.items() if seen is not None}

    @cached_property
    def pictures(self) -> Seen | None:
        """As of `evidence.look`."""
        return evidence.load(self.folder / evidence.PICTURES)

    @cached_property
    def costs(self) -> dict[str, Any]:
        """Operations and latency of "student" and "teacher", and "memory"."""
        return self._json(evidence.COSTS)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, versions and machine."""
        return self._json(evidence.ENVIRONMENT)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def teacher(self) -> Run | None:
        """The run that trained its teacher, beside it in a comparison."""
        if self.method == "none":
            return None
        own, shared = self.folder / "teacher", self.folder.resolve().parents[2] / "teacher"
        for folder in (own, *([shared] if self._cell else [])):
            if (folder / RECIPE).is_file():
                return Run.of(folder)
        return None

    @cached_property
    def alone(self) -> Run | None:
        """The run of the same seed without a teacher, in the same comparison."""
        folder = self.folder.resolve().parents[1] / "none" / self.folder.name
        return Run.of(folder) if self._cell and self.method != "none" and (folder / METRICS).is_file() else None

    @property
    def _cell(self) -> bool:
        """Whether it is one of a comparison."""
        return self.folder.resolve().parents[1].name == CELLS


def cells(folder: Path) -> list[Run]:
    """The runs of a comparison so far, by method as in its recipe, then by seed.

    Raises:
        ValueError: there are none.
    """
    recipe = read_recipe(folder / RECIPE)
    methods = (recipe.get("compare") or {}).get("methods", [])
    found = [Run.of(path.parent) for path in (folder / CELLS).glob(f"*/seed*/{RECIPE}")]
    if not found:
        raise ValueError(f"{folder} is the folder of a comparison without a run so far")

    def place(run: Run) -> tuple[int, str, int]:
        known = methods.index(run.method) if run.method in methods else len(methods)
        return known, run.method, int(run.recipe.get("seed", 0))

    return sorted(found, key=place)

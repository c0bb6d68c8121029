"""The tables of charts: what the pages show, in their order. A chart that has nothing to show is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matchdistill.report.charts import Chart
from matchdistill.report.class_charts import by_class, confusion, reliability
from matchdistill.report.comparison_charts import by_method, costs, differences
from matchdistill.report.position_charts import heats, margins, similarity
from matchdistill.report.run_charts import churn, curves, ignored, times
from matchdistill.report.runs import Run

RUNS: list[Callable[[Sequence[Run]], Chart | None]] = [curves, times]  # of runs side by side
CLASSES: list[Callable[[Run], Chart | None]] = [by_class, confusion, reliability]  # of what each run's networks find
RUN: list[Callable[[Run], Chart | None]] = [churn, ignored]  # of each run
POSITION: list[Callable[[Run, int], list[Chart]]] = [heats, similarity, margins]  # of each position, by number
COMPARISON: list[Callable[[Sequence[Run]], Chart | None]] = [differences, by_method, costs]  # of a comparison's runs

"""The models and pairs that the choice of taps is measured on, and what was said of them when their rows were reviewed."""

from benchmarks.taps_rows.pairs import PAIRS
from benchmarks.taps_rows.reviewed import REVIEWED
from benchmarks.taps_rows.stages import STAGES

__all__ = ["PAIRS", "REVIEWED", "STAGES"]

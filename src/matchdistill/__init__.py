"""Matching Guided Distillation: a big vision network trains a small one through its intermediate features.

Source: K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020 (arXiv 2008.09958).
"""

from typing import TYPE_CHECKING, Any

from matchdistill.choice import find_taps
from matchdistill.distiller import MatchingDistiller
from matchdistill.reduction import Reduction
from matchdistill.taps import Tap

if TYPE_CHECKING:
    from matchdistill.runs.predict import Predictor

__all__ = ["MatchingDistiller", "Predictor", "Reduction", "Tap", "find_taps"]


def __getattr__(name: str) -> Any:
    """`Predictor`, which needs torchvision, timm and Lightning, once it is asked for."""
    if name == "Predictor":
        from matchdistill.runs.predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Matching Guided Distillation: a big vision network trains a small one through its intermediate features.

Source: K. Yue, J. Deng, F. Zhou, "Matching Guided Distillation", ECCV 2020 (arXiv 2008.09958).
"""

from matchdistill.choice import find_taps
from matchdistill.distiller import MatchingDistiller
from matchdistill.reduction import Reduction
from matchdistill.taps import Tap

__all__ = ["MatchingDistiller", "Reduction", "Tap", "find_taps"]

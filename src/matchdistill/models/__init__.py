"""Networks by name, weights loaded safely, and the small network of the quickstart."""

from matchdistill.models.build import build_model
from matchdistill.models.small import small_resnet
from matchdistill.models.weights import load_weights

__all__ = ["build_model", "load_weights", "small_resnet"]

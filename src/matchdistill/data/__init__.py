"""Images with labels for classification."""

from matchdistill.data.images import ImageData
from matchdistill.data.loading import EpochSampler

__all__ = ["EpochSampler", "ImageData"]

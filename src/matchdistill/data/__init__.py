"""Images with labels for classification, images with boxes and masks for detection."""

from matchdistill.data.detection import DetectionData
from matchdistill.data.images import ImageData
from matchdistill.data.loading import EpochSampler

__all__ = ["DetectionData", "EpochSampler", "ImageData"]

"""Images with labels for classification, with boxes and masks for detection, with a class for every pixel."""

from matchdistill.data.detection import DetectionData, DetectionOptions
from matchdistill.data.images import ImageData, ImageOptions
from matchdistill.data.loading import EpochSampler
from matchdistill.data.module import DataOptions
from matchdistill.data.segmentation import SegmentationData, SegmentationOptions

__all__ = [
    "DataOptions",
    "DetectionData",
    "DetectionOptions",
    "EpochSampler",
    "ImageData",
    "ImageOptions",
    "SegmentationData",
    "SegmentationOptions",
]

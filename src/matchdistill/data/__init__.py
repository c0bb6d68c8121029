"""Images with labels, without labels, with boxes and masks, and with a class for every pixel."""

from matchdistill.data.detection import DetectionData, DetectionOptions
from matchdistill.data.images import ImageData, ImageOptions
from matchdistill.data.labels import LabelsData, LabelsOptions
from matchdistill.data.loading import EpochSampler
from matchdistill.data.module import DataOptions
from matchdistill.data.segmentation import SegmentationData, SegmentationOptions
from matchdistill.data.unlabelled import UnlabelledData, UnlabelledOptions

__all__ = [
    "DataOptions",
    "DetectionData",
    "DetectionOptions",
    "EpochSampler",
    "ImageData",
    "ImageOptions",
    "LabelsData",
    "LabelsOptions",
    "SegmentationData",
    "SegmentationOptions",
    "UnlabelledData",
    "UnlabelledOptions",
]

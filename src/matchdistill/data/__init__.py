"""Images with labels for classification, images without labels, images with boxes and masks for detection."""

from matchdistill.data.detection import DetectionData, DetectionOptions
from matchdistill.data.images import ImageData, ImageOptions
from matchdistill.data.labels import LabelsData, LabelsOptions
from matchdistill.data.loading import EpochSampler
from matchdistill.data.module import DataOptions
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
    "UnlabelledData",
    "UnlabelledOptions",
]

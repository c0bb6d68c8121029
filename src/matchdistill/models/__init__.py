"""Networks by name, weights loaded safely, detectors, segmenters, and the small network of the quickstart."""

from matchdistill.models.build import build_model, weights_file
from matchdistill.models.detection import build_detector, detector
from matchdistill.models.heads import build_body
from matchdistill.models.preparation import Preparation
from matchdistill.models.segmentation import build_segmenter, segmenter
from matchdistill.models.small import small_resnet
from matchdistill.models.weights import load_weights, save_weights

__all__ = [
    "Preparation",
    "build_body",
    "build_detector",
    "build_model",
    "build_segmenter",
    "detector",
    "load_weights",
    "save_weights",
    "segmenter",
    "small_resnet",
    "weights_file",
]

"""Detectors, which score how suspicious an image is. Each is registered under a name.

To add a detector, subclass `Detector` and call `register`.
"""

from .base import (
    DETECTORS,
    Detector,
    DetectorInput,
    DetectorInputs,
    FittedDetector,
    State,
    Widths,
)
from .combined import Combined
from .features import FeaturePrediction
from .gap import ConfidenceGap

register = DETECTORS.register
names = DETECTORS.names
resolve = DETECTORS.resolve

register("gap", ConfidenceGap)
register("features", FeaturePrediction)
register("combined", Combined)

__all__ = [
    "Combined",
    "ConfidenceGap",
    "Detector",
    "DetectorInput",
    "DetectorInputs",
    "FeaturePrediction",
    "FittedDetector",
    "State",
    "Widths",
    "names",
    "register",
    "resolve",
]

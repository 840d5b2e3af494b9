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
from .combined import Combined, disagreement_score, reference_divergence
from .features import FeatureModel, FeaturePrediction, feature_score, fit_features
from .gap import ConfidenceGap

register = DETECTORS.register
names = DETECTORS.names
resolve = DETECTORS.resolve

register("gap", ConfidenceGap)
register("features", FeaturePrediction)
register("combined", Combined)

__all__ = [
    "DETECTORS",
    "Combined",
    "ConfidenceGap",
    "Detector",
    "DetectorInput",
    "DetectorInputs",
    "FeatureModel",
    "FeaturePrediction",
    "FittedDetector",
    "State",
    "Widths",
    "disagreement_score",
    "feature_score",
    "fit_features",
    "names",
    "reference_divergence",
    "register",
    "resolve",
]

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
"""Add a detector under a name, `register(name, cls)`.

`name` has lower-case letters, digits, `-` and `_`. `cls` is a frozen dataclass that extends `Detector` and has a
default for every field. A `ConfigError` is raised if the name is malformed or taken, or the class is not such a
dataclass.
"""

names = DETECTORS.names
"""Return the names of the registered detectors in the order of registration, a tuple of strings."""

resolve = DETECTORS.resolve
"""Return a detector, `resolve(given, argument="detector")`.

`given` is a detector, which is returned as it is, or a name, which gives that detector with its default settings.
A `ConfigError`, which names the `argument`, is raised if the detector is not registered.
"""

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

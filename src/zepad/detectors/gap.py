"""The paper's detector, the confidence gap between the hardened branches and the benign branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import detection_score
from .base import Detector, DetectorInputs, State


@dataclass(frozen=True, kw_only=True)
class ConfidenceGap(Detector):
    """Score images by `zepad.functional.detection_score`; the paper's threshold is 0.1.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), detection.
    """

    first_threshold: ClassVar[float | None] = 0.1

    def score(self, inputs: DetectorInputs, state: State) -> Tensor:  # noqa: ARG002 - nothing is fitted
        """Return the confidence gap of each image, `(N,)` in [-1, 1]."""
        return detection_score(inputs.logits)

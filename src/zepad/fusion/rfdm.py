"""The paper's fusion rule, an average of the logits weighted by confidence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import is_number, require
from ..functional import confidence, log_confidence
from .base import AveragingRule


@dataclass(frozen=True, kw_only=True)
class RFDM(AveragingRule):
    """Robust federated decision mechanism: average logits with the weights `w_i = c_i / sum_j c_j`.

    `c_i` is the `confidence` of branch i. Adding a constant to one branch's logits changes no decision. Scaling them
    does, because the confidence depends on the scale. An attacker who makes one branch confidently wrong can therefore
    decide the outcome; this limit is known.

    Attributes:
        sharpness: Exponent `k` of the confidence; the paper uses 3.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """

    sharpness: float = 3.0

    def __post_init__(self) -> None:
        """Check the sharpness.

        Raises:
            ConfigError: If `sharpness` is negative or not a finite number.
        """
        k = self.sharpness
        require(is_number(k) and 0 <= k < 1e38, "sharpness", k, "a number of zero or more")

    def log_weights(self, logits: Tensor) -> Tensor:
        """Return the log-confidence of each branch, `(B, N)`."""
        return log_confidence(logits, self.sharpness)

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence of each branch with this sharpness, `(B, N)`."""
        return confidence(logits, sharpness=self.sharpness)

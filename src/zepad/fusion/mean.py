"""The plain average of the branches' logits, which serves as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import AveragingRule


@dataclass(frozen=True, kw_only=True)
class Mean(AveragingRule):
    """Average logits with equal weights `1 / B`."""

    def log_weights(self, logits: Tensor) -> Tensor:
        """Return zeros `(B, N)`."""
        return logits.new_zeros(logits.shape[:2])

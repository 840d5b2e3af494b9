"""Training objectives, one small function each, for one training loop."""

from .base import Batch, Objective, Outcome
from .zepad import benign_objective, zepad_objective

__all__ = ["Batch", "Objective", "Outcome", "benign_objective", "zepad_objective"]

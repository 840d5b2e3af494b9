"""What a training objective is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..modules import Branch


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        images: Clean images `(N, C, H, W)` in [0, 1].
        adversarial: The same images attacked; the clean images themselves where training is benign.
        labels: int64 `(N,)`.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor


class Outcome(NamedTuple):
    """What one evaluation of an objective gives.

    Attributes:
        loss: The scalar to minimise.
        adversarial_logits: `(N, K)`, for the progress bar.
        benign_logits: `(N, K)`, for the progress bar.
    """

    loss: Tensor
    adversarial_logits: Tensor
    benign_logits: Tensor


Objective = Callable[[Branch, Batch], Outcome]
"""One function per hardening method; every method plugs into the same loop."""

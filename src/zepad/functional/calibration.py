"""Thresholds with a finite-sample guarantee."""

from __future__ import annotations

import math

from torch import Tensor


def conformal_threshold(scores: Tensor, *, fpr: float) -> float:
    """Return the threshold that a fresh benign score exceeds with probability at most `fpr`.

    The threshold is the `ceil((N + 1) (1 - fpr))`-th smallest of the N benign scores. The guarantee only assumes that
    the fresh score is exchangeable with them.

    Args:
        scores: Detection scores of benign images, `(N,)`; larger is more suspicious.
        fpr: Tolerated false positive rate in (0, 1).

    Returns:
        The threshold; an image is flagged when its score is larger.

    Raises:
        ValueError: If `fpr` is out of range, there are fewer than `1 / fpr - 1` scores, or one is not finite.

    Examples:
        >>> import torch
        >>> conformal_threshold(torch.arange(99.0), fpr=0.05)
        94.0

    References:
        Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005 (split conformal prediction).
    """
    if not 0 < fpr < 1:
        raise ValueError(f"fpr must lie in (0, 1); got {fpr!r}.")
    if not bool(scores.isfinite().all()):
        raise ValueError("a threshold needs finite scores; got NaN or infinity. Check the weights of the model.")
    rank = math.ceil((scores.numel() + 1) * (1 - fpr))
    if rank > scores.numel():
        needed = math.ceil(1 / fpr) - 1
        raise ValueError(
            f"a false positive rate of {fpr:g} needs at least {needed} benign images; got {scores.numel()}. "
            "Pass more, or allow a higher fpr."
        )
    return float(scores.flatten().kthvalue(rank).values)

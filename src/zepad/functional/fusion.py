"""Building blocks of fusion rules and detectors: confidence and mean probabilities of stacked logits.

Logits are stacked `(B, N, K)`: the adversarially hardened branches first, the benign branch last.
"""

from __future__ import annotations

import math

from torch import Tensor

from .precision import accurate


def check_stacked(logits: Tensor, *, branches: int = 1) -> None:
    """Check that logits are stacked `(B, N, K)`.

    Args:
        logits: Tensor to check.
        branches: Smallest allowed number of branches `B`.

    Raises:
        ValueError: If `logits` is not a `(B, N, K)` floating-point tensor, or has fewer than `branches` branches.
    """
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor of shape (branches, images, classes); "
            f"got {logits.dtype} of shape {tuple(logits.shape)}. Stack the branches with torch.stack."
        )
    if logits.shape[0] < branches:
        raise ValueError(
            f"at least {branches} branches are needed, hardened ones first and the benign one last; "
            f"got {logits.shape[0]}."
        )


def log_confidence(logits: Tensor, sharpness: float) -> Tensor:
    """Return the logarithm of `confidence`, which overflows for no sharpness.

    Args:
        logits: Logits `(B, N, K)`, float32 or float64.
        sharpness: Exponent `k` of the confidence.

    Returns:
        Log-confidence `(B, N)` in the dtype of `logits`.
    """
    log_max = logits.log_softmax(dim=-1).amax(dim=-1)
    return log_max + sharpness * (log_max.exp() - 0.5)


def confidence(logits: Tensor, *, sharpness: float = 3.0) -> Tensor:
    """Return the confidence of each branch for each image, `c = m * exp(k * (m - 1/2))`.

    `m` is the largest softmax probability and `k` the sharpness: c(0.5) = 0.5, c(0.9) = 2.99, c(1) = 4.48 for k = 3.

    Args:
        logits: Logits `(B, N, K)` of any float dtype.
        sharpness: Exponent `k`; the paper uses 3. With zero the confidence is the probability itself.

    Returns:
        Positive confidences `(B, N)` in the dtype of `logits`; half precision is computed in float32.

    Raises:
        ValueError: If `logits` is not a `(B, N, K)` floating-point tensor.

    Examples:
        >>> import torch
        >>> confidence(torch.tensor([[[0.0, 0.0]]]))
        tensor([[0.5000]])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    check_stacked(logits)
    return log_confidence(accurate(logits), sharpness).exp().to(logits.dtype)


def mean_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the class probabilities averaged over all branches.

    Args:
        logits: Logits `(B, N, K)`, float32 or float64.

    Returns:
        Log-probabilities `(N, K)` in the dtype of `logits`.
    """
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def hardened_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the class probabilities averaged over the hardened branches.

    Args:
        logits: Logits `(B, N, K)`, float32 or float64, hardened branches first, the benign branch last.

    Returns:
        Log-probabilities `(N, K)` in the dtype of `logits`.
    """
    return mean_log_probabilities(logits[:-1])

"""Confidence-weighted fusion of branches (RFDM) and the detection score, as pure functions of logits.

Logits are stacked `(B, N, K)`: the adversarially hardened branches first, the benign branch last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import accurate


def _check_stacked(logits: Tensor) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor of shape (branches, images, classes); "
            f"got {logits.dtype} of shape {tuple(logits.shape)}. Stack the branches with torch.stack."
        )


def _log_confidence(logits: Tensor, sharpness: float) -> Tensor:
    # log m + k (m - 1/2): in logarithms no sharpness overflows.
    log_max = logits.log_softmax(dim=-1).amax(dim=-1)
    return log_max + sharpness * (log_max.exp() - 0.5)


def confidence(logits: Tensor, *, sharpness: float = 3.0) -> Tensor:
    """Return the confidence of each branch in each image, `c = m * exp(k * (m - 1/2))`.

    `m` is the largest softmax probability and `k` the sharpness: c(0.5) = 0.5, c(0.9) = 2.99, c(1) = 4.48 for k = 3.

    Args:
        logits: `(B, N, K)`, any float dtype.
        sharpness: The exponent `k`; the paper uses 3. Zero makes the confidence the probability itself.

    Returns:
        `(B, N)`, positive, in the dtype of `logits` (half precision is computed in float32).

    Raises:
        ValueError: If `logits` is not a `(B, N, K)` floating-point tensor.

    Examples:
        >>> import torch
        >>> confidence(torch.tensor([[[0.0, 0.0]]]))
        tensor([[0.5000]])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    _check_stacked(logits)
    return _log_confidence(accurate(logits), sharpness).exp().to(logits.dtype)


def _rfdm_scores(logits: Tensor, sharpness: float) -> Tensor:
    return _log_confidence(logits, sharpness)


def _mean_scores(logits: Tensor, sharpness: float) -> Tensor:  # noqa: ARG001 - every rule has one signature
    return logits.new_zeros(logits.shape[:2])


def _entropy_scores(logits: Tensor, sharpness: float) -> Tensor:  # noqa: ARG001 - every rule has one signature
    log_probabilities = logits.log_softmax(dim=-1)
    # Negative entropy. exp(-inf) * -inf would be nan; exp(-1e4) is zero already, so impossible classes count as zero.
    return (log_probabilities.exp() * log_probabilities.clamp_min(-1e4)).sum(dim=-1)


FUSION_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rfdm": _rfdm_scores,
    "mean": _mean_scores,
    "entropy": _entropy_scores,
}
"""Each rule maps `(B, N, K)` logits to unnormalised log-weights `(B, N)`; a softmax over the branches follows."""


def fusion_weights(logits: Tensor, *, rule: str = "rfdm", sharpness: float = 3.0) -> Tensor:
    """Return the weight of each branch for each image; weights are positive and sum to 1 over the branches.

    * `"rfdm"`: `w_i = c_i / sum_j c_j` with the `confidence` above (the paper's rule).
    * `"mean"`: `w_i = 1 / B`.
    * `"entropy"`: `w_i` proportional to `exp(-H_i)`, the inverse perplexity of the branch: the more certain
      branch weighs more (the reference code of the paper has this the wrong way round).

    Args:
        logits: `(B, N, K)`, any float dtype.
        rule: One of `FUSION_RULES`.
        sharpness: The exponent of `"rfdm"`; the other rules have none.

    Returns:
        `(B, N)` in the dtype of `logits`.

    Raises:
        ValueError: If the rule is unknown or `logits` is not `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> fusion_weights(torch.tensor([[[9.0, -9.0]], [[0.0, 0.0]]])).squeeze()
        tensor([0.8996, 0.1004])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    _check_stacked(logits)
    if rule not in FUSION_RULES:
        raise ValueError(f"unknown fusion rule {rule!r}; expected one of {sorted(FUSION_RULES)}.")
    return FUSION_RULES[rule](accurate(logits), sharpness).softmax(dim=0).to(logits.dtype)


def fuse_logits(logits: Tensor, *, rule: str = "rfdm", sharpness: float = 3.0) -> Tensor:
    """Fuse the branches into one `(N, K)` tensor of logits, `z = sum_i w_i z_i`.

    Logits are averaged, not probabilities, with the weights of `fusion_weights`. Differentiable with respect to every
    branch. Adding a constant to one branch's logits changes no decision; *scaling* one branch's logits does, because
    the confidence depends on the scale: a known limit of the rule.

    Args:
        logits: `(B, N, K)`, any float dtype.
        rule: One of `FUSION_RULES`.
        sharpness: The exponent of `"rfdm"`.

    Returns:
        `(N, K)` in the dtype of `logits`.

    Raises:
        ValueError: As `fusion_weights`.

    Examples:
        >>> import torch
        >>> fuse_logits(torch.tensor([[[2.0, 0.0]], [[4.0, 2.0]]]))
        tensor([[3., 1.]])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    weights = fusion_weights(accurate(logits), rule=rule, sharpness=sharpness)
    return torch.einsum("bn,bnk->nk", weights, accurate(logits)).to(logits.dtype)


def detection_score(logits: Tensor) -> Tensor:
    """Score how suspicious each image is: the confidence gap between the hardened branches and the benign branch.

    The paper's idea: an attack crafted on public encoders moves the benign branch off its training data, so that it
    loses
    confidence while the hardened branches keep theirs. How far that carries is a matter of measurement. The paper
    flags an image when the gap exceeds 0.1 but does not say how the
    two hardened confidences combine. Here the confidence is the largest softmax probability `m` and the
    hardened branches are averaged: `score = mean(m_1, ..., m_{B-1}) - m_B`.

    Args:
        logits: `(B, N, K)` with `B >= 2`, hardened branches first, the benign branch last.

    Returns:
        `(N,)` in [-1, 1]; larger is more suspicious. In the dtype of `logits`.

    Raises:
        ValueError: If there are fewer than two branches or `logits` is not `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> detection_score(torch.tensor([[[9.0, -9.0]], [[9.0, -9.0]], [[0.0, 0.0]]]))
        tensor([0.5000])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), detection.
    """
    _check_stacked(logits)
    if logits.shape[0] < 2:
        raise ValueError(f"detection compares branches and needs at least 2; got {logits.shape[0]}.")
    largest = accurate(logits).softmax(dim=-1).amax(dim=-1)
    return (largest[:-1].mean(dim=0) - largest[-1]).to(logits.dtype)

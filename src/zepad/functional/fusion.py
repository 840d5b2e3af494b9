"""Rules that fuse branches into one decision, as pure functions of logits.

Logits are stacked `(B, N, K)`: the adversarially hardened branches first, the benign branch last.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accurate


def check_stacked(logits: Tensor, *, branches: int = 1) -> None:
    """Refuse anything but stacked logits.

    Raises:
        ValueError: If `logits` is not a `(B, N, K)` floating-point tensor, or has fewer branches.
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
    check_stacked(logits)
    return _log_confidence(accurate(logits), sharpness).exp().to(logits.dtype)


# rules that average logits ----------------------------------------------------------------------------------------


def _rfdm_scores(logits: Tensor, *, sharpness: float = 3.0) -> Tensor:
    return _log_confidence(logits, sharpness)


def _mean_scores(logits: Tensor) -> Tensor:
    return logits.new_zeros(logits.shape[:2])


def _entropy_scores(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(dim=-1)
    # Negative entropy. exp(-inf) * -inf would be nan; exp(-1e4) is zero already, so impossible classes count as zero.
    return (log_probabilities.exp() * log_probabilities.clamp_min(-1e4)).sum(dim=-1)


def _calibrated_scores(logits: Tensor, *, temperatures: Sequence[float] = (), sharpness: float = 3.0) -> Tensor:
    return _log_confidence(_tempered(logits, temperatures), sharpness)


def _tempered(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    if not temperatures:
        return logits
    if len(temperatures) != logits.shape[0]:
        raise ValueError(f"temperatures must be one per branch, {logits.shape[0]}; got {len(temperatures)}.")
    return logits / logits.new_tensor(temperatures)[:, None, None]


_AVERAGING: dict[str, Callable[..., Tensor]] = {
    "rfdm": _rfdm_scores,
    "mean": _mean_scores,
    "entropy": _entropy_scores,
    "calibrated": _calibrated_scores,
}
"""Each maps `(B, N, K)` logits to unnormalised log-weights `(B, N)`; a softmax over the branches follows."""


def fusion_weights(logits: Tensor, *, rule: str = "rfdm", **parameters: Any) -> Tensor:
    """Return the weight of each branch for each image; weights are positive and sum to 1 over the branches.

    * `"rfdm"`: `w_i = c_i / sum_j c_j` with the `confidence` above (the paper's rule).
    * `"mean"`: `w_i = 1 / B`.
    * `"entropy"`: `w_i` proportional to `exp(-H_i)`, the inverse perplexity of the branch: the more certain
      branch weighs more (the reference code of the paper has this the wrong way round).
    * `"calibrated"`: as `"rfdm"`, after each branch's logits are divided by its temperature.

    Args:
        logits: `(B, N, K)`, any float dtype.
        rule: One that averages logits; the others of `FUSION_RULES` weigh no branches.
        **parameters: Of the rule: `sharpness`, and `temperatures` of `"calibrated"`.

    Returns:
        `(B, N)` in the dtype of `logits`.

    Raises:
        ValueError: If the rule averages nothing, does not have such a parameter, or `logits` is not `(B, N, K)`
            floating point.

    Examples:
        >>> import torch
        >>> fusion_weights(torch.tensor([[[9.0, -9.0]], [[0.0, 0.0]]])).squeeze()
        tensor([0.8996, 0.1004])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    check_stacked(logits)
    _check_parameters(_AVERAGING, rule, parameters)
    return _AVERAGING[rule](accurate(logits), **parameters).softmax(dim=0).to(logits.dtype)


def averages(rule: str) -> bool:
    """Whether a rule averages logits, so that `fusion_weights` can say how much each branch counts."""
    return rule in _AVERAGING


def _average(logits: Tensor, rule: str, **parameters: float) -> Tensor:
    return torch.einsum("bn,bnk->nk", _AVERAGING[rule](logits, **parameters).softmax(dim=0), logits)


def rfdm(logits: Tensor, *, sharpness: float = 3.0) -> Tensor:
    """Average logits by confidence, the paper's robust federated decision mechanism.

    Adding a constant to one branch's logits changes no decision; *scaling* them does, because the confidence depends
    on the scale. Whoever makes one branch confidently wrong decides: a known limit.

    Args:
        logits: `(B, N, K)`.
        sharpness: The exponent of the confidence.

    Returns:
        `(N, K)`.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism.
    """
    return _average(logits, "rfdm", sharpness=sharpness)


def mean(logits: Tensor) -> Tensor:
    """Average logits `(B, N, K)` with equal weights, to `(N, K)`."""
    return _average(logits, "mean")


def entropy(logits: Tensor) -> Tensor:
    """Average logits `(B, N, K)` by the inverse perplexity of each branch, to `(N, K)`."""
    return _average(logits, "entropy")


def calibrated(logits: Tensor, *, temperatures: Sequence[float] = (), sharpness: float = 3.0) -> Tensor:
    """Divide each branch's logits by its temperature, then fuse by `rfdm`: confidences of one scale.

    Args:
        logits: `(B, N, K)`.
        temperatures: One positive number per branch, such as `fit_temperature` finds; none is one for all.
        sharpness: Of `rfdm`.

    Returns:
        `(N, K)`.

    Raises:
        ValueError: If there are not as many temperatures as branches.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599 (temperature scaling).
    """
    return rfdm(_tempered(logits, temperatures), sharpness=sharpness)


# rules in which the benign branch has a say but never the last word ---------------------------------------------------


def mean_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the branches' mean probabilities, `(B, N, K)` to `(N, K)`."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def hardened_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the hardened branches' mean probabilities, `(B, N, K)` to `(N, K)`."""
    return mean_log_probabilities(logits[:-1])


def _benign(logits: Tensor) -> Tensor:
    # Whatever the benign branch says: infinity minus infinity would void the bound.
    return logits[-1].nan_to_num(nan=0.0)


def bounded(logits: Tensor, *, vote: float = 0.5) -> Tensor:
    """Add a bounded vote of the benign branch to what the hardened branches say, `log p_H + vote * p_B`.

    `p_H` is the mean probability of the hardened branches and `p_B` that of the benign branch. Probabilities differ by
    one at most, so whatever the benign branch says, a class whose `log p_H` leads every other's by more than `vote` is
    the decision: who has not broken the hardened branches that far cannot win by breaking the benign one.

    Args:
        logits: `(B, N, K)` with `B >= 2`.
        vote: The bound, zero or more. Zero leaves the hardened branches alone to decide.

    Returns:
        `(N, K)`.

    Examples:
        >>> import torch
        >>> hardened, benign = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 99.0]]])
        >>> bounded(torch.cat([hardened, benign]), vote=1.9).argmax().item()
        0
    """
    return hardened_log_probabilities(logits) + vote * _benign(logits).softmax(dim=-1)


def mixed(
    logits: Tensor, *, scale: float = 5.0, power: float = 4.0, bias: float = -1.0, benign_weight: float = 0.3
) -> Tensor:
    """Mix probabilities after a nonlinear transform of the robust logits, as MixedNUTS does.

    With `h` the mean logits of the hardened branches, standardised over the classes, and `g = GELU(h + bias)`:
    `log((1 - a) * softmax(scale * sign(g) * |g| ** power) + a * onehot(benign))`. The benign branch speaks as one vote
    for its class. A decision stands whatever it says where the transformed probabilities lead by more than
    `a / (1 - a)`.

    GELU falls before it rises: where the best class does not clear the clamp, `h + bias` below zero or so, the order of
    the classes turns round and the benign branch decides. With two classes `h` is at most 0.71, so keep `bias` above
    -0.7 there. The published formula is the same.

    The gradient passes the one-hot vote as if it were the benign branch's softmax: in the published form it has none,
    which would be a gift to weak attacks.

    Args:
        logits: `(B, N, K)` with `B >= 2`.
        scale: Positive.
        power: At least 1; larger powers separate sure from unsure decisions.
        bias: Added before the soft clamp.
        benign_weight: `a`, in [0, 1); the paper's `1 - alpha`.

    Returns:
        `(N, K)`: logarithms of probabilities, which sum to 1.

    References:
        Bai, Zhou, Patel, Sojoudi, MixedNUTS: Training-Free Accuracy-Robustness Balance via Nonlinearly Mixed
        Classifiers, TMLR 2024, arXiv 2402.02263.
    """
    robust = robust_transform(logits[:-1].mean(dim=0), scale=scale, power=power, bias=bias).log_softmax(dim=-1)
    weight = logits.new_tensor(benign_weight)
    robust, benign = robust + torch.log1p(-weight), _benign(logits).log_softmax(dim=-1) + weight.log()
    one_hot = F.one_hot(benign.argmax(dim=-1), benign.shape[-1]).bool()
    exact = torch.logaddexp(robust, torch.where(one_hot, weight.log(), -torch.inf))
    soft = torch.logaddexp(robust, benign)
    return exact.detach() + (soft - soft.detach())


def robust_transform(logits: Tensor, *, scale: float, power: float, bias: float) -> Tensor:
    """Return `scale * sign(g) * |g| ** power` with `g = GELU(standardised logits + bias)`, `(N, K)` to `(N, K)`.

    References:
        As `mixed`.
    """
    bounded_logits = logits.clamp(-1e15, 1e15)  # beyond it the variance overflows
    centred = bounded_logits - bounded_logits.mean(dim=-1, keepdim=True)
    clamped = F.gelu(centred / (bounded_logits.var(dim=-1, keepdim=True) + 1e-8).sqrt() + bias)
    return scale * clamped.sign() * clamped.abs() ** power


def candidates(logits: Tensor, *, depth: float = 0.5) -> Tensor:
    """Let the benign branch choose among the classes that the hardened branches consider possible.

    Possible is what `log p_H` puts at most `depth` below the best. Among those the probability of the hardened branches
    is shared out as the benign branch sees fit; all other classes keep theirs, so that they never win. Where the
    best class leads by more than `depth` there is nothing to choose.

    Args:
        logits: `(B, N, K)` with `B >= 2`.
        depth: Zero or more. Zero leaves the hardened branches alone to decide.

    Returns:
        `(N, K)`: logarithms of probabilities, which sum to 1.
    """
    hardened = hardened_log_probabilities(logits)
    possible = hardened >= hardened.amax(dim=-1, keepdim=True) - depth
    share = _benign(logits).log_softmax(dim=-1).masked_fill(~possible, -torch.inf).log_softmax(dim=-1)
    mass = hardened.masked_fill(~possible, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.where(possible, mass + share, hardened)


FUSION_RULES: dict[str, Callable[..., Tensor]] = {
    "rfdm": rfdm,
    "mean": mean,
    "entropy": entropy,
    "calibrated": calibrated,
    "bounded": bounded,
    "mixed": mixed,
    "candidates": candidates,
}
"""Each maps stacked logits `(B, N, K)` and its own parameters to fused logits `(N, K)`."""

_NEEDS_TWO = {"bounded", "mixed", "candidates"}


def rule_parameters(rule: str) -> tuple[str, ...]:
    """Return the names of a rule's parameters.

    Raises:
        ValueError: If the rule is unknown.

    Examples:
        >>> rule_parameters("bounded")
        ('vote',)
    """
    _check_parameters(FUSION_RULES, rule, {})
    return tuple(inspect.signature(FUSION_RULES[rule]).parameters)[1:]


def _check_parameters(rules: dict[str, Callable[..., Tensor]], rule: str, parameters: dict[str, Any]) -> None:
    if rule not in rules:
        what = "unknown fusion rule" if rule not in FUSION_RULES else "no weights are defined for the rule"
        raise ValueError(f"{what} {rule!r}; expected one of {sorted(rules)}.")
    known = tuple(inspect.signature(rules[rule]).parameters)[1:]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        has = ", ".join(known) or "none"
        raise ValueError(f"the rule {rule!r} has no parameter {', '.join(unknown)}; it has {has}.")


def fuse_logits(logits: Tensor, *, rule: str = "rfdm", **parameters: Any) -> Tensor:
    """Fuse the branches into one `(N, K)` tensor of logits by one of `FUSION_RULES`.

    Differentiable with respect to every branch. The parameters of the rules:

    * `"rfdm"`: `sharpness`; `"mean"` and `"entropy"`: none; `"calibrated"`: `temperatures`, `sharpness`;
    * `"bounded"`: `vote`; `"candidates"`: `depth`; `"mixed"`: `scale`, `power`, `bias`, `benign_weight`.

    Args:
        logits: `(B, N, K)`, any float dtype; at least two branches for the last three.
        rule: One of `FUSION_RULES`.
        **parameters: Of the rule.

    Returns:
        `(N, K)` in the dtype of `logits`.

    Raises:
        ValueError: If the rule is unknown, does not have such a parameter, or `logits` is not `(B, N, K)` floating
            point with branches enough.

    Examples:
        >>> import torch
        >>> fuse_logits(torch.tensor([[[2.0, 0.0]], [[4.0, 2.0]]]))
        tensor([[3., 1.]])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism, and as each rule says.
    """
    check_stacked(logits, branches=2 if rule in _NEEDS_TWO else 1)
    _check_parameters(FUSION_RULES, rule, parameters)
    return FUSION_RULES[rule](accurate(logits), **parameters).to(logits.dtype)

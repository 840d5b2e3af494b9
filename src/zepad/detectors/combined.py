"""The maximum of four scores: confidence gap, disagreement, divergence from the reference, and feature prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional import check_stacked, detection_score, hardened_log_probabilities, mean_log_probabilities
from ..functional.precision import accurate
from .base import Detector, DetectorInput, DetectorInputs, State, Widths
from .features import FeaturePrediction

_FEATURES = FeaturePrediction()


@dataclass(frozen=True, kw_only=True)
class Combined(Detector):
    """Score images by the maximum of four scores, each standardised by its mean and deviation on benign images.

    The four are `detection_score`, the logarithms of `disagreement_score` and `reference_divergence`, and the score of
    `FeaturePrediction`. Compared with `FeaturePrediction` alone, this detector flags more of the attacks on the whole
    ensemble whose attacker does not know of a detector, and fewer of those on the public victim.
    """

    needs: ClassVar[DetectorInput] = FeaturePrediction.needs

    def score(self, inputs: DetectorInputs, state: State) -> Tensor:
        """Return the largest standardised score, `(N,)`."""
        centre, spread = state["centre"], state["spread"]
        return ((_parts(inputs, state) - centre[:, None]) / spread[:, None]).amax(dim=0)

    def fit(self, inputs: DetectorInputs) -> dict[str, Tensor]:
        """Return the state of `FeaturePrediction`, and the mean and standard deviation of the four scores.

        Raises:
            ValueError: If there are fewer than ten images.
        """
        state = _FEATURES.fit(inputs)
        parts = _parts(inputs, state)
        return {**state, "centre": parts.mean(dim=1), "spread": parts.std(dim=1).clamp_min(1e-6)}

    def state_shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state of `FeaturePrediction` and of the four means and deviations."""
        return {**_FEATURES.state_shapes(widths), "centre": (4,), "spread": (4,)}


def _parts(inputs: DetectorInputs, state: State) -> Tensor:
    """Return the four scores `(4, N)`."""
    assert inputs.reference_logits is not None
    # On benign images both scores are close to zero; only their logarithms have a useful standard deviation.
    disagreement = disagreement_score(inputs.logits).clamp_min(1e-7).log()
    divergence = reference_divergence(inputs.logits, reference=inputs.reference_logits).clamp_min(1e-7).log()
    gap = detection_score(inputs.logits)
    return torch.stack([gap, disagreement, divergence, _FEATURES.score(inputs, state)])


def disagreement_score(logits: Tensor) -> Tensor:
    """Return the disagreement of the hardened branches and the benign branch, `1 - sum_k sqrt(p_H(k) p_B(k))`.

    `p_H` is the mean probability of the hardened branches and `p_B` that of the benign branch. The sum is the
    Bhattacharyya coefficient of the two distributions: one where they are equal, zero where they share no class.

    Args:
        logits: Logits `(B, N, K)` with `B >= 2`, hardened branches first, the benign branch last.

    Returns:
        Scores `(N,)` in [0, 1], in the dtype of `logits`.

    Raises:
        ValueError: If there are fewer than two branches or `logits` is not `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> disagreement_score(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).round(decimals=2)
        tensor([1.])
    """
    check_stacked(logits, branches=2)
    stacked = accurate(logits)
    halves = hardened_log_probabilities(stacked) + stacked[-1].log_softmax(dim=-1)
    return (1 - (halves / 2).exp().sum(dim=-1)).clamp(0, 1).to(logits.dtype)


def reference_divergence(logits: Tensor, *, reference: Tensor) -> Tensor:
    """Return the divergence of the ensemble from the undefended victim, `KL(ensemble || victim)`.

    The ensemble is represented by the mean probabilities of all branches. An adversarial example crafted on the public
    victim fools the victim but not the ensemble; one that does not fool the victim looks benign to this score. The
    score does not depend on the fusion rule, so its threshold stays valid when the rule changes.

    Args:
        logits: Logits `(B, N, K)` of one branch or more.
        reference: Logits `(N, K)` of the undefended victim with a head of its own.

    Returns:
        Scores `(N,)`, zero or more, in the dtype of `logits`.

    Raises:
        ValueError: If `logits` is not `(B, N, K)` floating point, or `reference` is not `(N, K)`.

    Examples:
        >>> import torch
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> reference_divergence(same[None], reference=same).abs().round(decimals=6)
        tensor([0.])
    """
    check_stacked(logits)
    if logits.shape[1:] != reference.shape:
        raise ValueError(
            "reference logits must have the shape (images, classes) of the branches' logits, "
            f"{tuple(logits.shape[1:])}; got {tuple(reference.shape)}."
        )
    ensemble = mean_log_probabilities(accurate(logits))
    victim = accurate(reference).log_softmax(dim=-1)
    return (ensemble.exp() * (ensemble - victim)).sum(dim=-1).clamp_min(0).to(logits.dtype)

"""Four scores in one: the most suspicious of gap, disagreement, divergence from the reference, and features."""

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
    """Take the largest of four scores, each in benign standard deviations from its benign mean.

    The four are `detection_score`, the logarithms of `disagreement_score` and `reference_divergence`, and the score of
    `FeaturePrediction`. It sees more of the attacks on the whole ensemble that do not know of it than the features
    alone do, and less of those on the public victim.
    """

    needs: ClassVar[DetectorInput] = FeaturePrediction.needs

    def score(self, inputs: DetectorInputs, state: State) -> Tensor:
        """Return the largest standardised score, `(N,)`."""
        centre, spread = state["centre"], state["spread"]
        return ((_parts(inputs, state) - centre[:, None]) / spread[:, None]).amax(dim=0)

    def fit(self, inputs: DetectorInputs) -> dict[str, Tensor]:
        """Return the state of the features, and mean and standard deviation of the four scores.

        Raises:
            ValueError: If there are fewer than ten images.
        """
        state = _FEATURES.fit(inputs)
        parts = _parts(inputs, state)
        return {**state, "centre": parts.mean(dim=1), "spread": parts.std(dim=1).clamp_min(1e-6)}

    def state_shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the features' state and of the four means and deviations."""
        return {**_FEATURES.state_shapes(widths), "centre": (4,), "spread": (4,)}


def _parts(inputs: DetectorInputs, state: State) -> Tensor:
    """Return the four scores `(4, N)`."""
    assert inputs.reference_logits is not None
    # Logarithms, so that the scores of benign images have a spread worth the name.
    disagreement = disagreement_score(inputs.logits).clamp_min(1e-7).log()
    divergence = reference_divergence(inputs.logits, reference=inputs.reference_logits).clamp_min(1e-7).log()
    gap = detection_score(inputs.logits)
    return torch.stack([gap, disagreement, divergence, _FEATURES.score(inputs, state)])


def disagreement_score(logits: Tensor) -> Tensor:
    """Score how far the hardened branches and the benign branch disagree, `1 - sum_k sqrt(p_H(k) p_B(k))`.

    The sum is the Bhattacharyya coefficient of the two distributions: one where they are equal, zero where they share
    no class.

    Args:
        logits: As in `detection_score`.

    Returns:
        `(N,)` in [0, 1], in the dtype of `logits`.

    Raises:
        ValueError: As `detection_score`.

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
    """Score how far the branches' mean probabilities are from the undefended victim's, `KL(ensemble || victim)`.

    An adversarial example that is crafted on the public victim fools it by construction, while the ensemble holds.
    One that fails to fool it looks benign to this score. The fusion has no part in it: a threshold outlives a change of
    the rule.

    Args:
        logits: As in `detection_score`, of one branch or more.
        reference: Logits of the undefended victim with a head of its own `(N, K)`.

    Returns:
        `(N,)`, zero or more, in the dtype of `logits`.

    Raises:
        ValueError: As `detection_score`, or if the shapes do not fit each other.

    Examples:
        >>> import torch
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> reference_divergence(same[None], reference=same).abs().round(decimals=6)
        tensor([0.])
    """
    check_stacked(logits)
    if logits.shape[1:] != reference.shape:
        raise ValueError(
            f"reference logits must have the shape (images, classes) of the branches', {tuple(logits.shape[1:])}; got "
            f"{tuple(reference.shape)}."
        )
    ensemble = mean_log_probabilities(accurate(logits))
    victim = accurate(reference).log_softmax(dim=-1)
    return (ensemble.exp() * (ensemble - victim)).sum(dim=-1).clamp_min(0).to(logits.dtype)

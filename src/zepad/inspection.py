"""What each branch makes of each image, for a person who debugs one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .functional import confidence, detection_score
from .modules import Fusion
from .types import ROLES, Role


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchReport:
    """The verdict on each image and what every branch contributed to it. Print it to read it.

    Attributes:
        roles: The branches, in the order of the first axis below.
        branch_labels: Class each branch says, `(B, N)`.
        branch_probabilities: Probability it gives that class, `(B, N)`.
        confidences: RFDM confidence of each branch, `(B, N)`.
        weights: Weight of each branch in the fusion, `(B, N)`; sums to 1 over the branches.
        labels: Class of the fused decision, `(N,)`.
        probabilities: Probability of that class, `(N,)`.
        scores: Detection score, `(N,)`; larger is more suspicious.
        flagged: Score above the threshold, bool `(N,)`.
        threshold: Of the score.
        class_names: One per class, or None.
    """

    roles: tuple[Role, ...]
    branch_labels: Tensor
    branch_probabilities: Tensor
    confidences: Tensor
    weights: Tensor
    labels: Tensor
    probabilities: Tensor
    scores: Tensor
    flagged: Tensor
    threshold: float
    class_names: tuple[str, ...] | None = None

    def name(self, label: int) -> str:
        """Return the name of a class, its number where there is none."""
        return self.class_names[label] if self.class_names else str(label)

    def __str__(self) -> str:
        return "\n\n".join(self._image(i) for i in range(len(self.labels)))

    def _image(self, i: int) -> str:
        verdict = "FLAGGED as attacked" if self.flagged[i] else "not flagged"
        lines = [
            f"image {i}: {self.name(int(self.labels[i]))} ({self.probabilities[i]:.1%}), {verdict} "
            f"(score {self.scores[i]:+.3f}, threshold {self.threshold:.3f})",
            f"  {'branch':<10} {'says':<14} {'probability':>11} {'confidence':>11} {'weight':>8}",
        ]
        lines += [
            f"  {role:<10} {self.name(int(self.branch_labels[b, i])):<14} {self.branch_probabilities[b, i]:>11.1%} "
            f"{self.confidences[b, i]:>11.3f} {self.weights[b, i]:>8.1%}"
            for b, role in enumerate(self.roles)
        ]
        return "\n".join(lines)


def inspect_branches(
    logits: Tensor, fusion: Fusion, *, threshold: float, class_names: tuple[str, ...] | None = None
) -> BranchReport:
    """Report on stacked logits `(B, N, K)`.

    Args:
        logits: Hardened branches first, the benign branch last.
        fusion: The rule in use.
        threshold: Of the detection score.
        class_names: One per class, or None.
    """
    branch = logits.softmax(dim=-1).max(dim=-1)
    fused = fusion(logits).softmax(dim=-1).max(dim=-1)
    scores = detection_score(logits)
    return BranchReport(
        roles=ROLES,
        branch_labels=branch.indices,
        branch_probabilities=branch.values,
        confidences=confidence(logits, sharpness=fusion.config.sharpness),
        weights=fusion.weights(logits),
        labels=fused.indices,
        probabilities=fused.values,
        scores=scores,
        flagged=scores > threshold,
        threshold=threshold,
        class_names=class_names,
    )

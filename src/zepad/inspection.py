"""A report on the predictions of each branch for each image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .escaping import clean
from .finite import check_finite
from .fusion import FusionRule


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchReport:
    """The decision on each image and the contribution of every branch. Printing it shows a table per image.

    Attributes:
        names: Names of the branches, in the order of the first axis of the tensors below.
        branch_labels: Class that each branch predicts, int64 `(B, N)`.
        branch_probabilities: Probability that each branch gives to the class it predicts, `(B, N)`.
        abstains: Whether the benign branch prefers no class, bool `(N,)`: its encoder sees something else than the
            encoder that was restored from the same public one. With a memory it is the memory that may abstain.
        memory_abstains: Whether the memory, which is one half of the benign branch, prefers no class, bool `(N,)`; None
            for a model without a memory.
        confidences: RFDM confidence of each branch, `(B, N)`.
        weights: Weight of each branch in the fusion, `(B, N)`; weights sum to 1 over the branches. None for a rule that
            does not average logits.
        labels: Class of the fused decision, int64 `(N,)`.
        probabilities: Probability of the class of the fused decision, `(N,)`.
        class_probabilities: Probability of every class in the fused decision, `(N, K)`.
        scores: Detection score, `(N,)`; larger is more suspicious. None until the detector is calibrated.
        flagged: Whether the score is above the threshold, bool `(N,)`; None without a threshold.
        threshold: Threshold of the detection score, or None before there is one.
        class_names: Name of each class, or None.
        single: Whether the report was asked for on one image, and not on a batch of one.
    """

    names: tuple[str, ...]
    branch_labels: Tensor
    branch_probabilities: Tensor
    abstains: Tensor
    memory_abstains: Tensor | None
    confidences: Tensor
    weights: Tensor | None
    labels: Tensor
    probabilities: Tensor
    class_probabilities: Tensor
    scores: Tensor | None
    flagged: Tensor | None
    threshold: float | None
    class_names: tuple[str, ...] | None = None
    single: bool = False

    def name(self, label: int) -> str:
        """Return the name of a class as the data set has it, or its number as text if the classes have no names."""
        return self.class_names[label] if self.class_names else str(label)

    def __str__(self) -> str:
        if len(self.labels) == 1:
            return self._image(0)
        return "\n\n".join(f"image {i}: {self._image(i)}" for i in range(len(self.labels)))

    def _image(self, i: int) -> str:
        weighed = self.weights is not None
        lines = [
            f"{clean(self.name(int(self.labels[i])))} ({self.probabilities[i]:.1%}), {self._verdict(i)}",
            f"  {'branch':<10} {'says':<14} {'probability':>11} {'confidence':>11}{'   weight' if weighed else ''}",
        ]
        lines += [
            f"  {clean(role):<10} {self._said(b, i):<14} "
            f"{self.branch_probabilities[b, i]:>11.1%} {self.confidences[b, i]:>11.3f}"
            + ("" if self.weights is None else f" {self.weights[b, i]:>8.1%}")
            for b, role in enumerate(self.names)
        ]
        if self.memory_abstains is not None:
            lines.append(f"  {'memory':<10} {'abstains' if self.memory_abstains[i] else 'speaks'}")
        return "\n".join(lines)

    def _said(self, branch: int, i: int) -> str:
        if branch == len(self.names) - 1 and self.abstains[i]:
            return "abstains"
        return clean(self.name(int(self.branch_labels[branch, i])))

    def _verdict(self, i: int) -> str:
        if self.scores is None or self.flagged is None or self.threshold is None:
            return "not scored: calibrate the detector"
        verdict = "FLAGGED as attacked" if self.flagged[i] else "not flagged"
        return f"{verdict} (score {self.scores[i]:+.3f}, threshold {self.threshold:.3f})"


def inspect_branches(
    logits: Tensor,
    fusion: FusionRule,
    *,
    names: tuple[str, ...],
    silent: Tensor,
    memory: bool,
    scores: Tensor | None,
    threshold: float | None,
    class_names: tuple[str, ...] | None = None,
    single: bool = False,
) -> BranchReport:
    """Return the report on stacked logits.

    Args:
        logits: Logits `(B, N, K)`, hardened branches first, the benign branch last.
        fusion: Fusion rule of the ensemble.
        names: Names of the branches, in the order of the logits.
        silent: Whether the memory or, without a memory, the benign branch abstains, bool `(N,)`.
        memory: Whether the ensemble has a memory.
        scores: Detection scores `(N,)`, or None if the detector cannot score yet.
        threshold: Threshold of the detection score, or None.
        class_names: Name of each class, or None.
        single: Whether the report is on one image, and not on a batch of one.

    Raises:
        InputError: If fused logits or a score are not finite.
    """
    branch = logits.softmax(dim=-1).max(dim=-1)
    probabilities = check_finite(fusion(logits), "logits").softmax(dim=-1)
    fused = probabilities.max(dim=-1)
    if scores is not None:
        check_finite(scores, "detection scores")
    return BranchReport(
        names=names,
        branch_labels=branch.indices,
        branch_probabilities=branch.values,
        abstains=torch.zeros_like(silent) if memory else silent,
        memory_abstains=silent if memory else None,
        confidences=fusion.confidence(logits),
        weights=fusion.weights(logits),
        labels=fused.indices,
        probabilities=fused.values,
        class_probabilities=probabilities,
        scores=scores,
        flagged=None if scores is None or threshold is None else scores > threshold,
        threshold=threshold,
        class_names=class_names,
        single=single,
    )

"""PGD adversarial training: cross-entropy of attacked images alone."""

from __future__ import annotations

from torch.nn import functional as F

from ..modules import Branch
from .base import Batch, ObjectiveOutput, Recipe


def pgd_at() -> Recipe:
    """Return the recipe `min_theta E max_delta CE(F(E(x + delta)), y)` of PGD adversarial training.

    No clean image is trained on. BatchNorm's statistics are those of the adversarial images, the only ones that pass in
    training mode.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083,
        equation (2.1).
    """
    return Recipe(name="pgd_at()", objective=_adversarial_cross_entropy)


def _adversarial_cross_entropy(branch: Branch, batch: Batch) -> ObjectiveOutput:
    logits = branch(batch.adversarial)
    return ObjectiveOutput(F.cross_entropy(logits.float(), batch.labels), adversarial_logits=logits.detach())

"""PGD adversarial training: the baseline of all baselines."""

from __future__ import annotations

from torch.nn import functional as F

from ..modules import Branch
from .base import Batch, HardeningMethod, Outcome


def pgd_at() -> HardeningMethod:
    """Harden with `min_theta E max_delta CE(F(E(x + delta)), y)`: no clean image is trained on.

    BatchNorm's statistics are those of the adversarial images, the only ones that pass in training mode.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083,
        equation (2.1).
    """
    return HardeningMethod(name="pgd_at()", objective=_adversarial_cross_entropy)


def _adversarial_cross_entropy(branch: Branch, batch: Batch) -> Outcome:
    logits = branch(batch.adversarial)
    return Outcome(F.cross_entropy(logits.float(), batch.labels), adversarial_logits=logits.detach())

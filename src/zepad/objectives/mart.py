"""MART: images that are misclassified to begin with are pulled harder."""

from __future__ import annotations

from ..config import is_number, require
from ..functional import boosted_cross_entropy, kl_divergence
from ..modules import Branch
from .base import Batch, HardeningMethod, Outcome


def mart(*, beta: float = 5.0) -> HardeningMethod:
    """Harden with `BCE(f(x'), y) + beta * KL(f(x) || f(x')) * (1 - p_y(x))`; the attack maximises cross-entropy.

    `BCE(f(x'), y) = -log p_y(x') - log(1 - max_{k != y} p_k(x'))`. BatchNorm as in `trades`: two forwards, both with
    gradients and both training the statistics.

    Args:
        beta: Weight of the divergence, `lambda` in the paper.

    Raises:
        ConfigError: If `beta` is no number of zero or more.

    References:
        Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020,
        equations (10) and (11).
    """
    require(is_number(beta) and beta >= 0, "beta", beta, "a number of zero or more")

    def objective(branch: Branch, batch: Batch) -> Outcome:
        attacked, logits = branch(batch.adversarial), branch(batch.images)
        right = logits.float().softmax(dim=1).gather(1, batch.labels[:, None]).squeeze(1)
        divergence = kl_divergence(logits=attacked, target=logits) * (1 - right)
        loss = boosted_cross_entropy(attacked, batch.labels).mean() + beta * divergence.mean()
        return Outcome(loss, attacked.detach(), logits.detach())

    return HardeningMethod(name=f"mart(beta={beta:g})", objective=objective)

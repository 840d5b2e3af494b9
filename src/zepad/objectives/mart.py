"""MART: images that are misclassified to begin with are pulled harder."""

from __future__ import annotations

from ..config import is_number, require
from ..functional import boosted_cross_entropy, kl_divergence
from ..modules import Branch
from .base import Batch, ObjectiveOutput, Recipe


def mart(*, beta: float = 5.0) -> Recipe:
    """Return the recipe `BCE(f(x'), y) + beta * KL(f(x) || f(x')) * (1 - p_y(x))` of MART.

    The attack maximises cross-entropy. `BCE(f(x'), y) = -log p_y(x') - log(1 - max_{k != y} p_k(x'))`. Clean and
    adversarial images pass BatchNorm in two forwards, both with gradients and both training the statistics.

    Args:
        beta: Weight of the divergence, written `lambda` in the paper.

    Raises:
        ConfigError: If `beta` is no number of zero or more.

    References:
        Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020,
        equations (10) and (11).
    """
    require(is_number(beta) and beta >= 0, "beta", beta, "a number of zero or more")

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        attacked, logits = branch(batch.adversarial), branch(batch.images)
        right = logits.float().softmax(dim=1).gather(1, batch.labels[:, None]).squeeze(1)
        divergence = kl_divergence(logits=attacked, target=logits) * (1 - right)
        loss = boosted_cross_entropy(attacked, batch.labels).mean() + beta * divergence.mean()
        return ObjectiveOutput(loss, attacked.detach(), logits.detach())

    return Recipe(name=f"mart(beta={beta:g})", objective=objective)

"""TRADES: cross-entropy of clean images and the divergence of attacked ones from them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import is_number, require
from ..functional import kl_divergence
from ..modes import evaluating
from ..modules import Branch
from .base import Batch, Inner, ObjectiveOutput, Recipe, Targets


def trades(*, beta: float = 6.0) -> Recipe:
    """Return the recipe `CE(f(x), y) + beta * max_delta KL(f(x) || f(x + delta))` of TRADES.

    The attack maximises the divergence. Clean and adversarial images pass BatchNorm in two forwards, and both train its
    statistics: both carry gradients, so both are normalised by their own batch, as in the paper.

    Args:
        beta: Weight of the divergence, written `1 / lambda` in the paper.

    Raises:
        ConfigError: If `beta` is no number of zero or more.

    References:
        Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019, arXiv 1901.08573,
        equation (5).
    """
    require(is_number(beta) and beta >= 0, "beta", beta, "a number of zero or more")

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        logits, attacked = branch(batch.images), branch(batch.adversarial)
        divergence = kl_divergence(logits=attacked, target=logits).mean()
        loss = F.cross_entropy(logits.float(), batch.labels) + beta * divergence
        return ObjectiveOutput(loss, attacked.detach(), logits.detach())

    return Recipe(
        name=f"trades(beta={beta:g})",
        objective=objective,
        inner=Inner(loss=_divergence, targets=_clean_logits),
    )


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return kl_divergence(logits=logits, target=target)


def _clean_logits(_: Branch) -> Targets:
    def targets(branch: Branch, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 - they play no part here
        with evaluating(branch), torch.no_grad():
            logits: Tensor = branch(images)
        return logits.float()

    return targets

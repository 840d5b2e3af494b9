"""ZePAD's own objectives: adversarial for the MPAE encoders, plain cross-entropy for the benign one."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..functional import structure_loss
from ..modules import Branch, evaluating
from .base import Batch, HardeningMethod, Objective, Outcome


def zepad_method(*, structure_weight: float) -> HardeningMethod:
    """Return ZePAD's own hardening: `zepad_objective` outside, PGD on cross-entropy inside.

    Args:
        structure_weight: As in `zepad_objective`.
    """
    return HardeningMethod(
        name=f"zepad(structure_weight={structure_weight:g})",
        objective=zepad_objective(structure_weight=structure_weight),
    )


def zepad_objective(*, structure_weight: float) -> Objective:
    """Return `L = CE(F(E(x + delta)), y) + structure_weight * L_f / N`.

    Adversarial and clean images pass BatchNorm separately: the adversarial ones train the statistics, the clean
    ones only read them, and their features are a fixed target. Concatenating the two in one batch leaves statistics
    that
    fit neither. `L_f` is divided by the batch size so that its weight means the same for every batch.

    Args:
        structure_weight: Weight of the structure loss per row.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """

    def objective(branch: Branch, batch: Batch) -> Outcome:
        # Adversarial first: autocast caches the cast weights, and a cache filled without gradients would have none.
        features = branch.encoder(batch.adversarial)
        logits = branch.head(features)
        with evaluating(branch), torch.no_grad():
            benign_features = branch.encoder(batch.images)
            benign_logits = branch.head(benign_features)
        loss = F.cross_entropy(logits.float(), batch.labels)
        if structure_weight:
            structure = structure_loss(adversarial=features.float(), benign=benign_features.float())
            loss = loss + structure_weight * structure / len(features)
        return Outcome(loss, logits.detach(), benign_logits)

    return objective


def benign_objective(branch: Branch, batch: Batch) -> Outcome:
    """Return the cross-entropy on clean images.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    logits = branch(batch.images)
    return Outcome(F.cross_entropy(logits.float(), batch.labels), benign_logits=logits.detach())

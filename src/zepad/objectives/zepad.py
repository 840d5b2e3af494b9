"""ZePAD's own hardening: cross-entropy of attacked images and the structure loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..arguments import checked
from ..functional import structure_loss
from ..modes import evaluating
from ..modules import Branch
from .base import Batch, Objective, ObjectiveOutput, Recipe


@checked
def zepad_recipe(*, structure_weight: float = 1.0) -> Recipe:
    """Return the recipe of multi-pattern adversarial enhancement: `zepad_objective` outside, cross-entropy inside.

    Args:
        structure_weight: Weight of the structure loss per row.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """
    return Recipe(
        name=f"zepad(structure_weight={structure_weight:g})",
        objective=zepad_objective(structure_weight=structure_weight),
    )


def zepad_objective(*, structure_weight: float) -> Objective:
    """Return `L = CE(F(E(x + delta)), y) + structure_weight * L_f / N`.

    Adversarial and clean images pass BatchNorm separately: the adversarial ones train the statistics, the clean
    ones only read them, and their features are a fixed target. Concatenating the two in one batch leaves statistics
    that fit neither. `L_f` is divided by the batch size so that its weight means the same for every batch.

    Args:
        structure_weight: Weight of the structure loss per row.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
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
        return ObjectiveOutput(loss, logits.detach(), benign_logits)

    return objective

"""Benign training: cross-entropy on clean images, the recipe of the benign branch."""

from __future__ import annotations

from torch.nn import functional as F

from ..modules import Branch
from .base import Batch, ObjectiveOutput, Recipe


def benign_recipe(*, freeze_encoder: bool = False) -> Recipe:
    """Return the recipe of benign memory preservation (BMP): `min_theta E CE(F(E(x)), y)` on clean images.

    Clean data are learnt faster than attacked ones: `epochs=None` provides for 100 updates instead of 900.

    Args:
        freeze_encoder: Whether the encoder stays as it is and the head alone is trained.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    return Recipe(
        name="benign",
        objective=benign_objective,
        inner=None,
        trained=("head",) if freeze_encoder else ("encoder", "head"),
        min_updates=100,
    )


def benign_objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
    """Return the cross-entropy on clean images.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    logits = branch(batch.images)
    return ObjectiveOutput(F.cross_entropy(logits.float(), batch.labels), benign_logits=logits.detach())

"""FARE: keep attacked features where the original encoder has the clean ones. No label, no head."""

from __future__ import annotations

from ..modules import Branch
from .base import Batch, Inner, ObjectiveOutput, Recipe, encoder_of, public_features, squared_distance


def fare() -> Recipe:
    """Return the recipe `min_theta E max_delta ||E_theta(x + delta) - E_original(x)||^2` of FARE, without labels.

    The attack maximises the same distance. Labels reach neither the encoder nor the choice of an epoch: the last one
    is kept, and the head is fitted afterwards on clean features. BatchNorm's statistics are those of the adversarial
    images, the only ones that pass in training mode.

    References:
        Schlarmann et al., Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large
        Vision-Language Models, ICML 2024, arXiv 2402.12336, equations (2) and (3).
    """
    return Recipe(
        name="fare()",
        objective=_embedding_distance,
        inner=Inner(loss=squared_distance, model=encoder_of, targets=public_features),
        trained=("encoder",),
        choose_epoch=False,
    )


def _embedding_distance(branch: Branch, batch: Batch) -> ObjectiveOutput:
    assert batch.targets is not None
    return ObjectiveOutput(squared_distance(branch.encoder(batch.adversarial).float(), batch.targets).mean())

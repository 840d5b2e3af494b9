"""How the encoder of the BMP branch is trained on clean data."""

from __future__ import annotations

from ..config import BenignConfig
from ..objectives import benign_objective
from .loop import Recipe


def benign_recipe(config: BenignConfig) -> Recipe:
    """Return the recipe of benign fine-tuning: cross-entropy on clean images, or on the head alone.

    Args:
        config: Whether the encoder is frozen.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    return Recipe(
        objective=benign_objective,
        name="benign",
        attack=None,
        trained=("head",) if config.freeze_encoder else ("encoder", "head"),
        min_updates=100,
        min_epochs=10,
    )

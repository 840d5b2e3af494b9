"""How the two encoders of the MPAE branch are adversarially fine-tuned."""

from __future__ import annotations

from ..attacks import PGD
from ..config import HardenConfig
from ..objectives import Objective, zepad_objective
from .loop import Recipe


def harden_recipe(config: HardenConfig, objective: Objective | None = None) -> Recipe:
    """Return the recipe of adversarial fine-tuning: PGD on cross-entropy inside, the objective outside.

    Args:
        config: Budget of the attack and weight of the structure loss.
        objective: What is minimised; ZePAD's own by default.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """
    step_size = config.step_size or 2 * config.eps / config.steps
    return Recipe(
        objective=objective or zepad_objective(structure_weight=config.structure_weight),
        attack=PGD(eps=config.eps, steps=config.steps, step_size=step_size),
        min_updates=300,
        min_epochs=10,
    )

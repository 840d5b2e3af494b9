"""Training objectives and the recipes around them, one small file each, for one training loop.

Each recipe is a value that is passed to `ZePAD.harden(objective=...)` or `zepad.training.harden_branch`. There is no
registry: a `Recipe` of your own, or a plain function from `(Branch, Batch)` to `ObjectiveOutput`, is passed just so.
"""

from .augmentation import Augmentation, FlipCrop
from .base import Adaptation, Batch, Inner, Objective, ObjectiveOutput, Rates, Recipe
from .benign import benign_recipe
from .fare import fare
from .gen_af import gen_af
from .mart import mart
from .mixture import DAEMixture, Member
from .pgd_at import pgd_at
from .restoration import restoration
from .static_adversarial_training import static_adversarial_training
from .trades import trades
from .zepad import zepad_recipe

__all__ = [
    "Adaptation",
    "Augmentation",
    "Batch",
    "DAEMixture",
    "FlipCrop",
    "Inner",
    "Member",
    "Objective",
    "ObjectiveOutput",
    "Rates",
    "Recipe",
    "benign_recipe",
    "fare",
    "gen_af",
    "mart",
    "pgd_at",
    "restoration",
    "static_adversarial_training",
    "trades",
    "zepad_recipe",
]

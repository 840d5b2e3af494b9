"""Training objectives and the recipes around them, one small file each, for one training loop.

Each recipe is a value that is passed to `ZePAD.harden(objective=...)` or `zepad.training.harden_branch`. There is no
registry: a `Recipe` of your own, or a plain function from `(Branch, Batch)` to `ObjectiveOutput`, is passed just so.
"""

from .augmentation import Augmentation, FlipCrop, augment_pair
from .base import CROSS_ENTROPY, Adaptation, Batch, Inner, Objective, ObjectiveOutput, Rates, Recipe, public_features
from .benign import benign_objective, benign_recipe
from .fare import fare
from .gen_af import gen_af, robust_criticality
from .mart import mart
from .mixture import DAEMixture, Member
from .pgd_at import pgd_at
from .restoration import restoration
from .static_adversarial_training import static_adversarial_training
from .trades import trades
from .zepad import zepad_objective, zepad_recipe

__all__ = [
    "CROSS_ENTROPY",
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
    "augment_pair",
    "benign_objective",
    "benign_recipe",
    "fare",
    "gen_af",
    "mart",
    "pgd_at",
    "public_features",
    "restoration",
    "robust_criticality",
    "static_adversarial_training",
    "trades",
    "zepad_objective",
    "zepad_recipe",
]

"""Universal attacks: one perturbation for every image."""

from .feature import UniversalFeatureAttack
from .perturbation import UniversalPerturbation

__all__ = ["UniversalFeatureAttack", "UniversalPerturbation"]

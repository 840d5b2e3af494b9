"""Universal attacks, which craft one perturbation for all images."""

from .advencoder import AdvEncoder, AdvEncoderPatch
from .feature import UniversalFeatureAttack
from .pap import PAPUGS, PAPBase, PAPFuse
from .perturbation import UniversalPerturbation
from .ssp import SSP
from .uap import UAP
from .uapgd import UAPGD

__all__ = [
    "PAPUGS",
    "SSP",
    "UAP",
    "UAPGD",
    "AdvEncoder",
    "AdvEncoderPatch",
    "PAPBase",
    "PAPFuse",
    "UniversalFeatureAttack",
    "UniversalPerturbation",
]

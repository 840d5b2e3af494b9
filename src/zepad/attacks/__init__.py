"""Attacks on any callable from images to features or logits."""

from .adapters import art_classifier, foolbox_model
from .adaptive import DetectorEvading, JointAPGD
from .apgd import APGD, TargetedAPGD
from .base import Attack
from .combine import Transfer, WorstOf, apgd_square_ensemble
from .feature import FeaturePGD, attack_features
from .losses import cosine_distance, cross_entropy, dlr, l2_distance, margin
from .pgd import PGD
from .square import Square
from .surrogates import fused_by, hardened_branches, mean_logits, one_branch
from .universal.advencoder import AdvEncoder, AdvEncoderPatch
from .universal.feature import UniversalFeatureAttack
from .universal.pap import PAPUGS, PAPBase, PAPFuse
from .universal.perturbation import UniversalPerturbation
from .universal.ssp import SSP
from .universal.uap import UAP
from .universal.uapgd import UAPGD

__all__ = [
    "APGD",
    "PAPUGS",
    "PGD",
    "SSP",
    "UAP",
    "UAPGD",
    "AdvEncoder",
    "AdvEncoderPatch",
    "Attack",
    "DetectorEvading",
    "FeaturePGD",
    "JointAPGD",
    "PAPBase",
    "PAPFuse",
    "Square",
    "TargetedAPGD",
    "Transfer",
    "UniversalFeatureAttack",
    "UniversalPerturbation",
    "WorstOf",
    "apgd_square_ensemble",
    "art_classifier",
    "attack_features",
    "cosine_distance",
    "cross_entropy",
    "dlr",
    "foolbox_model",
    "fused_by",
    "hardened_branches",
    "l2_distance",
    "margin",
    "mean_logits",
    "one_branch",
]

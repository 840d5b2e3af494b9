"""Attacks. They know a callable from images to features or logits, never a defense."""

from .adapters import art_classifier, foolbox_model
from .adaptive import (
    DetectorEvading,
    JointAPGD,
    Transfer,
    WorstOf,
    apgd_square_ensemble,
    fused_by,
    gap_score,
    hardened_branches,
    mean_logits,
    one_branch,
)
from .apgd import APGD, TargetedAPGD, targeted_dlr
from .feature import FeaturePGD, attack_features
from .pgd import PGD, Attack, AttackObjective, cosine_distance, cross_entropy, dlr, l2_distance, margin
from .square import Square
from .universal import (
    PAPUGS,
    SSP,
    UAP,
    UAPGD,
    AdvEncoder,
    AdvEncoderPatch,
    PAPBase,
    PAPFuse,
    UniversalFeatureAttack,
    UniversalPerturbation,
)

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
    "AttackObjective",
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
    "gap_score",
    "hardened_branches",
    "l2_distance",
    "margin",
    "mean_logits",
    "one_branch",
    "targeted_dlr",
]

"""Attacks. They know a callable from images to features or logits, never a defense."""

from .pgd import PGD, attack_features, cosine_distance, cross_entropy, margin
from .universal import UniversalFeatureAttack, UniversalPerturbation

__all__ = [
    "PGD",
    "UniversalFeatureAttack",
    "UniversalPerturbation",
    "attack_features",
    "cosine_distance",
    "cross_entropy",
    "margin",
]

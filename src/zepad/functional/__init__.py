"""Pure functions of tensors: fusion, structure losses, norm balls and metrics. They import torch alone."""

from .calibration import conformal_threshold
from .fusion import FUSION_RULES, confidence, detection_score, fuse_logits, fusion_weights
from .losses import boosted_cross_entropy, genetic_regularization, kl_divergence, structure_loss
from .metrics import Count, attack_success_count, correct_count, fooling_count
from .projection import (
    BALLS,
    Ball,
    project_l2,
    project_linf,
    project_pixels,
    random_l2,
    random_linf,
    steepest_l2,
    steepest_linf,
)

__all__ = [
    "BALLS",
    "FUSION_RULES",
    "Ball",
    "Count",
    "attack_success_count",
    "boosted_cross_entropy",
    "confidence",
    "conformal_threshold",
    "correct_count",
    "detection_score",
    "fooling_count",
    "fuse_logits",
    "fusion_weights",
    "genetic_regularization",
    "kl_divergence",
    "project_l2",
    "project_linf",
    "project_pixels",
    "random_l2",
    "random_linf",
    "steepest_l2",
    "steepest_linf",
    "structure_loss",
]

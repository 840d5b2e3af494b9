"""Pure functions of tensors: confidence, structure losses, norm balls and metrics. They depend on torch alone."""

from .calibration import conformal_threshold
from .detection import detection_score, restoration_gap, smoothed
from .fusion import check_stacked, confidence, hardened_log_probabilities, log_confidence, mean_log_probabilities
from .losses import boosted_cross_entropy, genetic_regularization, kl_divergence, structure_loss
from .metrics import Count, attack_success_count, correct_count, fooling_count

__all__ = [
    "Count",
    "attack_success_count",
    "boosted_cross_entropy",
    "check_stacked",
    "confidence",
    "conformal_threshold",
    "correct_count",
    "detection_score",
    "fooling_count",
    "genetic_regularization",
    "hardened_log_probabilities",
    "kl_divergence",
    "log_confidence",
    "mean_log_probabilities",
    "restoration_gap",
    "smoothed",
    "structure_loss",
]

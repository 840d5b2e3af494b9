"""Measure what a model withstands. Any map from images to logits can be evaluated."""

from .attackers import Attacker, ThreatModel, against, universal_attacker
from .comparable import with_baseline
from .evaluate import evaluate
from .identity import weights_digest
from .kept import keeping
from .rendering.files import save_report
from .report import AttackResult, Check, Cost, EvalReport, RobustRates, Sample
from .scoring import accuracy
from .statistics import Detection, Rate, auroc, detection
from .suites import (
    UniversalAttack,
    published,
    replica,
    replica_with_labels,
    semi_black_box,
    semi_black_box_plus,
    universal_attacks,
    universal_feature_attack,
    white_box,
)

__all__ = [
    "AttackResult",
    "Attacker",
    "Check",
    "Cost",
    "Detection",
    "EvalReport",
    "Rate",
    "RobustRates",
    "Sample",
    "ThreatModel",
    "UniversalAttack",
    "accuracy",
    "against",
    "auroc",
    "detection",
    "evaluate",
    "keeping",
    "published",
    "replica",
    "replica_with_labels",
    "save_report",
    "semi_black_box",
    "semi_black_box_plus",
    "universal_attacker",
    "universal_attacks",
    "universal_feature_attack",
    "weights_digest",
    "white_box",
    "with_baseline",
]

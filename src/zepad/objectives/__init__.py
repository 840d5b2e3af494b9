"""Training objectives and hardening methods, one small file each, for one training loop."""

from .base import CROSS_ENTROPY, Adaptation, Batch, HardeningMethod, Inner, Objective, Outcome
from .fare import fare
from .gen_af import gen_af, robust_criticality
from .mart import mart
from .pgd_at import pgd_at
from .trades import trades
from .zepad import benign_objective, zepad_method, zepad_objective

__all__ = [
    "CROSS_ENTROPY",
    "Adaptation",
    "Batch",
    "HardeningMethod",
    "Inner",
    "Objective",
    "Outcome",
    "benign_objective",
    "fare",
    "gen_af",
    "mart",
    "pgd_at",
    "robust_criticality",
    "trades",
    "zepad_method",
    "zepad_objective",
]

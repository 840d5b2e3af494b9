"""Whole evaluations in one call: every attacker on one model or many, replicas, and the experiments of the paper."""

from .experiments import ablation, matched, transfer
from .measuring import measure, save_reports, state_folder
from .protocol import Protocol
from .replicas import public_encoder, replica_branches, replica_of, train_replica

__all__ = [
    "Protocol",
    "ablation",
    "matched",
    "measure",
    "public_encoder",
    "replica_branches",
    "replica_of",
    "save_reports",
    "state_folder",
    "train_replica",
    "transfer",
]

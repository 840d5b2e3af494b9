"""Measure what a model withstands. Evaluation knows a callable, never the facade."""

from .scoring import accuracy, auroc

__all__ = ["accuracy", "auroc"]

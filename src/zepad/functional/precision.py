"""Floating-point precision of the computations in this package."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
"""The types of half precision."""


def accurate(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; return every other tensor unchanged."""
    return tensor.float() if tensor.dtype in HALVES else tensor

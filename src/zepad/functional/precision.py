"""In which precision a pure function computes."""

from __future__ import annotations

import torch
from torch import Tensor


def accurate(tensor: Tensor) -> Tensor:
    """Return half precision as float32 and everything else as it comes."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

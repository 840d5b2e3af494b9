"""Digests of tensors, and digests as people read them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's shape, dtype and bytes."""
    held = tensor.detach().cpu().contiguous()
    body = held.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(held.shape)} {held.dtype} ".encode() + body).hexdigest()


def shortened(digest: str) -> str:
    """Return the first 16 hexadecimal digits of a digest, enough to tell things apart in messages and file names."""
    return digest[:16]

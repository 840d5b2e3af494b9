"""Safetensors files that are refused where a single byte was changed: their record has the SHA-256 of all the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import CheckpointError
from .schema import read_bounded

_RECORD = "zepad"  # key of the metadata that holds the record
_BLANK = "0" * 64  # stands for the digest while the digest is computed


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a file holds, as it was read.

    Attributes:
        tensors: Tensors by name, on the CPU.
        record: JSON text of the record; empty where the file has none.
        data: Every byte of the file.
    """

    tensors: dict[str, Tensor]
    record: str
    data: bytes

    def is_sealed_by(self, digest: str) -> bool:
        """Return whether a digest, which the record has as its `sha256`, is that of all other bytes."""
        return _digest(self.data.replace(digest.encode("utf-8", "replace"), _BLANK.encode(), 1)) == digest


def seal(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file with a record, to which `sha256` is added.

    Args:
        tensors: Tensors by name.
        record: What the file says of itself, JSON-ready.

    Raises:
        TypeError, ValueError: If the record is no plain JSON.
    """
    text = json.dumps({"sha256": _BLANK, **record}, allow_nan=False)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    blank = save(held, {_RECORD: text})
    return blank.replace(_BLANK.encode(), _digest(blank).encode(), 1)


def read_sealed(path: Path, *, limit: int) -> Content:
    """Return what a safetensors file holds. Whether it is whole is asked of `Content.is_sealed_by`.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        CheckpointError: If the file is missing, is larger, cannot be read or is no safetensors file.
    """
    data = read_bounded(path, limit)
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        record = (json.loads(data[8 : 8 + length]).get("__metadata__") or {}).get(_RECORD, "")
    except (SafetensorError, ArithmeticError, AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}. Save or download it again.") from error
    return Content(tensors=tensors, record=record, data=data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

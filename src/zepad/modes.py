"""What holds for a while: the evaluation mode of a module, and the precision of forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .types import Precision


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a module in evaluation mode for a while and restore every submodule's own flag, also after an error.

    Args:
        model: An `nn.Module`; any other callable has no mode and is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True  # train() would also change the submodules, some of which are frozen


def autocast(device: torch.device, precision: Precision, *, cached: bool = True) -> Any:
    """Return the context manager in which forward passes have a precision.

    Args:
        device: Device that computes.
        precision: `"fp32"`, `"bf16"`, or `"auto"` for bfloat16 where the hardware computes in it.
        cached: Whether weights that are trained are converted once for the whole context, in which they must not
            change.
    """
    if not is_bf16(device, precision):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cached)


def is_bf16(device: torch.device, precision: Precision) -> bool:
    """Return whether a precision is bfloat16 on a device."""
    return precision == "bf16" or (precision == "auto" and has_native_bf16(device))


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since torch 2.10
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False

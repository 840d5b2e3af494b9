"""The mode of a module: evaluation for a while, then back to what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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

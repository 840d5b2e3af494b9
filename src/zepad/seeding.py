"""Randomness that depends on a seed alone and leaves the caller's generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Return a seed that depends on every part.

    Args:
        *parts: Integers of zero or more, such as seed, run, epoch and process.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch for a while, then restore the state of the caller's generators.

    Shuffling loaders and random transforms draw from the global generators. Training is seeded per epoch, so that a run
    resumed at an epoch draws the same numbers as an undisturbed run; an attack depends on its own seed alone.

    Args:
        seed: Seed of all three generators.
    """
    with restored():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - transforms use the global one
        torch.manual_seed(seed)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Restore the state of the global generators of Python, NumPy and torch after a while."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002

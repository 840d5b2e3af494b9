"""Names for the shapes and callables that travel through the library.

One shape alphabet everywhere: images `(N, C, H, W)`, features `(N, D)`, logits `(N, K)`, stacked branches
`(B, N, K)` with the hardened branches first and the benign branch last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

from torch import Tensor

Role: TypeAlias = Literal["victim", "auxiliary", "benign"]
"""The part an encoder plays: victim and auxiliary are hardened, benign is trained on clean data."""

Stage: TypeAlias = Literal["built", "hardened", "fitted"]
"""How far a model has come. Each stage enables the next call."""

Loader: TypeAlias = Iterable[Any]
"""Anything that can be iterated more than once and yields `(images, labels)` batches."""

ImageModel: TypeAlias = Callable[[Tensor], Tensor]
"""A map from images `(N, C, H, W)` in [0, 1] to features or logits."""

ROLES: tuple[Role, ...] = ("victim", "auxiliary", "benign")
HARDENED_ROLES: tuple[Role, ...] = ("victim", "auxiliary")

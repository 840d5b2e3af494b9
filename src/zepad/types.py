"""Names for the shapes and callables that travel through the library.

One shape alphabet everywhere: images `(N, C, H, W)`, features `(N, D)`, logits `(N, K)`, stacked branches
`(B, N, K)` with the hardened branches first and the benign branch last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Role: TypeAlias = Literal["victim", "auxiliary", "benign", "reference"]
"""The part an encoder plays: victim and auxiliary are hardened, benign is trained on clean data.

The reference is the undefended victim as it was published: it takes no part in the decision, and only some detectors
look at it.
"""

Stage: TypeAlias = Literal["built", "hardened", "fitted"]
"""How far a model has come. Each stage enables the next call."""

Loader: TypeAlias = Iterable[Any]
"""Anything that can be iterated more than once and yields `(images, labels)` batches."""

ImageModel: TypeAlias = Callable[[Tensor], Tensor]
"""A map from images `(N, C, H, W)` in [0, 1] to features or logits."""

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A map from model outputs and targets to one loss per image `(N,)`, which an attack maximises."""

ROLES: tuple[Role, ...] = ("victim", "auxiliary", "benign")
HARDENED_ROLES: tuple[Role, ...] = ("victim", "auxiliary")
REFERENCE: Role = "reference"
ENCODER_ROLES: tuple[Role, ...] = (*ROLES, REFERENCE)
"""The branches, and the encoder that only some detectors need."""


@runtime_checkable
class Branched(Protocol):
    """A defense whose branches can be looked at one by one: a `ZePAD`, or a `BranchEnsemble` of any branches.

    Submodules cannot be members: from Python 3.12 on, `isinstance` does not see the attributes that `nn.Module` keeps.
    """

    @property
    def branch_names(self) -> tuple[str, ...]:
        """One name per branch, in the order of `branch_logits`."""

    @property
    def threshold(self) -> float | None:
        """Detection threshold; None where there is no detector."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides beside the weights, JSON-ready: the fusion rule and the detector with their settings."""

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch, `(B, N, K)`."""

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the fused logits `(N, K)` of stacked ones `(B, N, K)`."""

    def score(self, images: Tensor) -> Tensor:
        """Return the detection score `(N,)`, differentiable and larger where suspicious."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return the fused logits, `(N, K)`."""

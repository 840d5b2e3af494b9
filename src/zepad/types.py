"""Type aliases and protocols that the whole library shares.

Letters of shapes mean the same everywhere: images `(N, C, H, W)`, features `(N, D)`, logits `(N, K)`, logits of stacked
branches `(B, N, K)` with the hardened branches first and the benign branch last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Role: TypeAlias = Literal["victim", "auxiliary", "benign", "reference", "memory"]
"""Role of an encoder: victim and auxiliary are hardened, benign is trained on local data.

The reference is the undefended victim as it was published. It takes no part in the decision; only some detectors use
it. The memory is the benign encoder as it was published, which joins the benign branch where that one is trained to
resist adversarial examples.
"""

Stage: TypeAlias = Literal["built", "hardened", "fitted"]
"""Stage of a model. Each stage enables the next call."""

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
"""Precision of forward passes: float32, bfloat16, or bfloat16 where the hardware computes in it."""

Loader: TypeAlias = Iterable[Any]
"""Anything that can be iterated more than once and yields batches: `(images, labels)`, or dicts of both."""

ImageModel: TypeAlias = Callable[[Tensor], Tensor]
"""A map from images `(N, C, H, W)` in [0, 1] to features or logits."""

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A map from model outputs and targets to one loss per image `(N,)`, which an attack maximises."""

ROLES: tuple[Role, ...] = ("victim", "auxiliary", "benign")
HARDENED_ROLES: tuple[Role, ...] = ("victim", "auxiliary")
REFERENCE: Role = "reference"
MEMORY: Role = "memory"
ENCODER_ROLES: tuple[Role, ...] = (*ROLES, REFERENCE, MEMORY)
"""Roles of the branches, followed by those of encoders that not every model has."""


@runtime_checkable
class Branched(Protocol):
    """A defense that exposes the logits of its branches: a `ZePAD`, or a `BranchEnsemble` of any branches.

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
        """Fusion rule and detector with their settings, JSON-ready."""

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch, `(B, N, K)`."""

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the fused logits `(N, K)` of stacked ones `(B, N, K)`."""

    def score(self, images: Tensor) -> Tensor:
        """Return the detection score `(N,)`, differentiable and larger where suspicious."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return the fused logits, `(N, K)`."""


@runtime_checkable
class Abstaining(Branched, Protocol):
    """A defense whose benign branch may abstain: a `ZePAD` or a `BranchEnsemble`."""

    @property
    def abstain_above(self) -> float | None:
        """Restoration gap above which the benign branch abstains; None where it always speaks."""

    def restoration_gap(self, images: Tensor) -> Tensor:
        """Return the restoration gap `(N,)`, differentiable."""

"""A perturbation that is the same for every image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class UniversalPerturbation:
    """One perturbation for all images, the form most downstream-agnostic attacks take.

    Attributes:
        delta: `(1, C, H, W)`, inside the ball.
        eps: Radius of the ball in [0, 1] pixel units.
        norm: Of the ball.
        provenance: How it was made: attack, budget, seed, number of images.
    """

    delta: Tensor
    eps: float
    norm: str = "linf"
    provenance: dict[str, Any] = field(default_factory=dict)

    def apply(self, images: Tensor) -> Tensor:
        """Return `images + delta`, clamped to [0, 1].

        Args:
            images: `(N, C, H, W)` in [0, 1], of the size the perturbation was made for.

        Raises:
            InputError: If the size differs.
        """
        if images.shape[1:] != self.delta.shape[1:]:
            raise InputError(
                f"the perturbation was made for images of shape {tuple(self.delta.shape[1:])}; got "
                f"{tuple(images.shape[1:])}. Resize the images or fit the attack at their size."
            )
        return (images + self.delta.to(images.device, images.dtype)).clamp(0, 1)

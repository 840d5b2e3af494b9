"""Downstream-agnostic adversarial examples (DAEs) of frozen public encoders, as residuals of 8 bits."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...digests import digest_tensor
from ...modes import autocast
from ...objectives import Member
from ...types import Precision

_LEVELS = 127
_MARGIN = 2.0**-23  # more than rounding adds to a pixel in [0, 1] plus a residual, in float32


def quantize(residual: Tensor, radius: float) -> Tensor:
    """Return a residual as int8 multiples of `level(radius)`, rounded toward zero.

    Rounding toward zero keeps every pixel between the clean and the attacked one: what was in the ball and in [0, 1]
    stays there.

    Args:
        residual: Attacked minus clean images, in [-radius, radius].
        radius: Radius of the L-infinity ball in [0, 1] pixel units.
    """
    return (residual / level(radius)).trunc().clamp(-_LEVELS, _LEVELS).to(torch.int8)


def level(radius: float) -> float:
    """Return the size of one step of a residual: 1/127 of the radius, less what float32 rounding could add."""
    return max(radius - _MARGIN, 0) / _LEVELS


class Crafter:
    """Crafts DAEs of public encoders by the attacks of a mixture.

    Args:
        public: Public encoders by name; they are copied, never modified.
        members: Attacks of the mixture.
        precision: Precision of the forward passes.
        device: Device that computes.
    """

    def __init__(
        self, public: Mapping[str, nn.Module], members: Sequence[Member], precision: Precision, device: torch.device
    ) -> None:
        used = {name for member in members for name in member.sources}
        self._encoders = {
            name: copy.deepcopy(encoder).to(device).eval().requires_grad_(False)
            for name, encoder in public.items()
            if name in used
        }
        self.members = tuple(members)
        self._precision, self.device = precision, device

    @property
    def radii(self) -> Tensor:
        """The radius of each member in [0, 1] pixel units, float64 `(M,)`."""
        return torch.tensor([member.attack.eps for member in self.members], dtype=torch.float64)

    def craft(self, member: int, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the residuals of one attack on a batch.

        Args:
            member: Index of the attack.
            images: Clean images `(N, C, H, W)` in [0, 1] on the device.
            generator: Random number generator on the device.

        Returns:
            Residuals in units of `level(radius)`, int8 `(N, C, H, W)`.
        """
        chosen = self.members[member]
        encoders = [self._encoders[name] for name in chosen.sources]
        with autocast(self.device, self._precision):
            attacked = chosen.attack(encoders, images, generator=generator)
        return quantize(attacked - images, chosen.attack.eps)

    def describe(self) -> dict[str, Any]:
        """Return what the DAEs depend on beside the images, JSON-ready: encoders by digest, attacks, precision."""
        return {
            "encoders": {name: digest_encoder(encoder) for name, encoder in self._encoders.items()},
            "members": [member.describe() for member in self.members],
            "precision": self._precision,
        }


def digest_encoder(encoder: nn.Module) -> str:
    """Return the SHA-256 of an encoder: the printed form of its modules, which has their settings, and its state."""
    state = {name: digest_tensor(tensor) for name, tensor in encoder.state_dict().items()}
    return digest_json([repr(encoder), state])


def digest_json(value: Any) -> str:
    """Return the SHA-256 of JSON-ready values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""The encoders of a defense, gathered from what a user gives and checked against each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from .encoders import Encoder, EncoderLike, Preprocessing, as_encoder, probe_role
from .errors import InputError
from .training import check_state
from .types import REFERENCE, Role


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Public encoders that fit together.

    Attributes:
        encoders: Copies of the encoders by role.
        features: Width of each encoder's features by role.
        channels: Number of channels of the images.
        shared_architecture: By role, another role whose module serves as the architecture when a custom encoder is
            loaded again.
    """

    encoders: dict[str, Encoder]
    features: dict[str, int]
    channels: int
    shared_architecture: dict[str, Role]

    @property
    def origins(self) -> dict[str, str]:
        """Where the encoders' pre-trained weights came from by role, as far as it is known."""
        return {role: encoder.origin for role, encoder in self.encoders.items() if encoder.origin}


def assemble(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    benign: EncoderLike | None,
    *,
    preprocess: Preprocessing | None,
    with_reference: bool,
) -> Assembly:
    """Gather the encoders of a defense; the benign encoder defaults to a copy of the auxiliary.

    Args:
        victim: The public encoder to protect.
        auxiliary: A second public encoder.
        benign: The encoder that only sees clean local data, or None. It is never taken from the victim, on whose
            weights attacks are crafted.
        preprocess: What the encoders expect, where they do not say so themselves.
        with_reference: Whether to keep a copy of the victim as the undefended reference.

    Raises:
        InputError: If an encoder's output is no feature tensor, or the encoders take different images.
        ConfigError: If a spec is wrong.
        HubError: If pre-trained weights cannot be had.
    """
    given: dict[str, EncoderLike | None] = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
    encoders = {role: as_encoder(role, source, preprocess) for role, source in given.items() if source is not None}
    copies: dict[str, Role] = {} if benign is not None else {"benign": "auxiliary"}
    if with_reference:
        copies[REFERENCE] = "victim"
    for role, source in copies.items():
        encoders[role] = copy.deepcopy(encoders[source])
    for role, encoder in encoders.items():
        check_state(role, encoder)
    shapes = {role: probe_role(role, encoder) for role, encoder in encoders.items()}
    channels = {count for count, _ in shapes.values()}
    if len(channels) != 1:
        each = ", ".join(f"{role} {count}" for role, (count, _) in shapes.items())
        raise InputError(f"all encoders must take images of the same channels; got {each}. Adapt one of them.")
    return Assembly(
        encoders=encoders,
        features={role: width for role, (_, width) in shapes.items()},
        channels=channels.pop(),
        shared_architecture={r: source for r, source in copies.items() if encoders[r].spec.source == "custom"},
    )

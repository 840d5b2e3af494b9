"""Assembly of a defense's encoders from the user's modules and specs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from .encoders import Encoder, EncoderLike, Preprocessing
from .encoders.given import as_encoder, examine
from .errors import InputError, InputWarning
from .training.copies import check_state
from .types import MEMORY, REFERENCE, Role


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Public encoders that fit together.

    Attributes:
        encoders: Copies of the encoders by role.
        features: Width of each encoder's features by role.
        channels: Number of channels of the images.
        shared_architecture: For each custom encoder that is a copy of another, the role of that other encoder. Its
            module provides the architecture when the encoder is loaded again.
    """

    encoders: dict[str, Encoder]
    features: dict[str, int]
    channels: int
    shared_architecture: dict[str, Role]

    @property
    def origins(self) -> dict[str, str]:
        """Origin of the pre-trained weights by role, for the encoders whose origin is known."""
        return {role: encoder.origin for role, encoder in self.encoders.items() if encoder.origin}


def assemble(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    benign: EncoderLike | None,
    *,
    preprocess: Preprocessing | None,
    with_reference: bool,
    with_memory: bool,
) -> Assembly:
    """Copy the encoders of a defense and check that they fit together.

    Args:
        victim: The public encoder to protect.
        auxiliary: A second public encoder.
        benign: The encoder of the benign branch, or None for a copy of the auxiliary. The victim
            is never copied for it, because attacks are crafted on its weights.
        preprocess: Preprocessing of encoders that do not define their own.
        with_reference: Whether to keep a copy of the victim as the undefended reference.
        with_memory: Whether to keep a copy of the benign encoder as its memory.

    Returns:
        The assembled encoders.

    Raises:
        InputError: If an encoder cannot be copied, its output is not a feature tensor, it does not hold to what
            `check_contract` asks for, or the encoders take different images.
        ConfigError: If a spec is malformed.
        HubError: If pre-trained weights cannot be downloaded.

    Warns:
        InputWarning: If two of the encoders given have the same weights.
    """
    given: dict[str, EncoderLike | None] = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
    encoders: dict[str, Encoder] = {}
    for role, module in given.items():
        if module is not None:
            encoders[role] = as_encoder(role, module, preprocess)
            check_state(role, encoders[role])
    shapes = {role: examine(role, encoder) for role, encoder in encoders.items()}
    copies: dict[str, Role] = {} if benign is not None else {"benign": "auxiliary"}
    if with_reference:
        copies[REFERENCE] = "victim"
    if with_memory:
        copies[MEMORY] = copies.get("benign", "benign")
    for role, source in copies.items():
        encoders[role], shapes[role] = copy.deepcopy(encoders[source]), shapes[source]
    _warn_of_repeated({role: encoders[role] for role in given if given[role] is not None})
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


def _warn_of_repeated(encoders: Mapping[str, Encoder]) -> None:
    for (one, first), (other, second) in combinations(encoders.items(), 2):
        if _same_weights(first, second):
            warnings.warn(
                f"{one} and {other} are the same encoder, so what is crafted on the one is crafted on the other. Pass "
                "two public encoders, preferably pre-trained by different methods.",
                InputWarning,
                stacklevel=5,
            )


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return bool(mine) and mine.keys() == theirs.keys() and all(_equal(mine[key], theirs[key]) for key in mine)


def _equal(first: Tensor, second: Tensor) -> bool:
    comparable = first.device == second.device and first.dtype == second.dtype
    return comparable and torch.equal(first, second)

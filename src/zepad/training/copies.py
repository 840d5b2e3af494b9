"""The copies of encoders that training works on, so that the caller's own are never modified."""

from __future__ import annotations

from torch import Tensor, nn

from ..encoders import Encoder
from ..encoders.given import copied
from ..errors import InputError


def copy_encoder(name: str, encoder: nn.Module) -> Encoder:
    """Return a copy of an encoder that can be trained.

    Args:
        name: Name of the encoder, for the message.
        encoder: An `Encoder`, or any module from images to features.

    Raises:
        InputError: If the encoder cannot be copied, or its state holds anything but tensors.
    """
    own = copied(name, encoder)
    check_state(name, own)
    return own


def check_state(name: str, encoder: nn.Module) -> None:
    """Refuse an encoder whose state holds anything but tensors: it could not be kept, synchronised or saved.

    Args:
        name: Name of the encoder, for the message.
        encoder: The encoder.

    Raises:
        InputError: If the state holds something else.
    """
    for key, value in encoder.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name}: the state of an encoder must be tensors alone; {key} is {type(value).__name__}. Remove "
                "get_extra_state from that module, or keep what it holds in buffers."
            )

"""An encoder as a user may give it, turned into an `Encoder`."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import InputError
from .encoder import Encoder, probe
from .preprocessing import Preprocessing
from .sources import build_encoder
from .sources.registry import wrap_module
from .spec import EncoderSpec

EncoderLike = nn.Module | EncoderSpec | str
"""An encoder as a user may give it: a module, an `Encoder`, a spec, or a spec string such as `"timm:resnet18"`."""


def as_encoder(role: str, source: EncoderLike, preprocess: Preprocessing | None = None) -> Encoder:
    """Return what a user gave as an encoder of its own, with pre-trained weights where it names some.

    Args:
        role: Name of the argument, for messages.
        source: A module or an `Encoder`, which is copied; or a spec or spec string, whose pre-trained weights are
            loaded.
        preprocess: Preprocessing of the encoder; None takes that of its own configuration. An `Encoder` keeps its own.

    Raises:
        InputError: If `source` is none of these.
        ConfigError: If a spec is wrong.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If pre-trained weights cannot be downloaded.
    """
    if isinstance(source, str):
        source = EncoderSpec.parse(source)
    if isinstance(source, EncoderSpec):
        encoder = build_encoder(source, pretrained=True)
        if preprocess is None:
            return encoder
        return Encoder(encoder.backbone, preprocessing=preprocess, pooling=encoder.pooling, spec=encoder.spec)
    if isinstance(source, Encoder):
        return copy.deepcopy(source)
    if isinstance(source, nn.Module):
        return wrap_module(source, preprocess)
    raise InputError(
        f"{role} must be a torch.nn.Module, an EncoderSpec or a spec string; got {type(source).__name__}. A function "
        "can be wrapped in a module."
    )


def probe_role(role: str, encoder: Encoder) -> tuple[int, int]:
    """Return `(channels, features)` of an encoder as `probe` does; an error names the role.

    Raises:
        InputError: If no dummy image gets through, or the output is no feature tensor.
    """
    try:
        return probe(encoder)
    except InputError as error:
        raise InputError(f"{role}: {error}") from error

"""The sources encoders come from, one file each.

A source is a module with `build(spec, *, pretrained)`, which makes an encoder from a name, and `wrap(module)`, which
copies a module that is the source's own into an encoder, or returns None. Building never touches the network unless
pre-trained weights are asked for, and no name of a spec is ever imported.
"""

from __future__ import annotations

import copy
from types import ModuleType

from torch import nn

from ...errors import ConfigError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from . import lightly, open_clip, packaged, solo, timm, torchvision, transformers

_SOURCES: dict[str, ModuleType] = {
    "timm": timm,
    "torchvision": torchvision,
    "open_clip": open_clip,
    "transformers": transformers,
    "solo": solo,
    "lightly": lightly,
    "zepad": packaged,
}


def build_encoder(spec: EncoderSpec, *, pretrained: bool = False) -> Encoder:
    """Build the encoder a spec names, without its classifier and with its own preprocessing.

    Args:
        spec: Any source but `"custom"`. Its preprocessing and pooling, where given, take the place of the model's own.
        pretrained: Load the source's pre-trained weights (which are downloaded if they are not cached); otherwise the
            weights are random and the network is not touched.

    Raises:
        ConfigError: If the source does not know the name, or its package is not installed.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If the weights cannot be had.
    """
    if spec.source not in _SOURCES:
        raise ConfigError(f"a {spec.source} encoder can only be built by its owner. Pass the module itself.")
    encoder: Encoder = _SOURCES[spec.source].build(spec, pretrained=pretrained)
    if spec.preprocessing is None and spec.pooling is None:
        return encoder
    return _adapted(encoder, spec.preprocessing, spec)


def wrap_module(module: nn.Module, preprocessing: Preprocessing | None = None) -> Encoder:
    """Copy a module and wrap it, finding source, preprocessing and classifier by itself for known sources.

    A timm or torchvision model loses its classifier in the copy, a CLIP model its text tower: the image features below
    are what tasks build on. A module of unknown origin is taken as it is and, without a `preprocessing`, as one that
    takes raw pixels.

    Args:
        module: The caller's module; never modified.
        preprocessing: Overrides what would be found.
    """
    for source in _SOURCES.values():
        found: Encoder | None = source.wrap(module)
        if found is not None:
            return found if preprocessing is None else _adapted(found, preprocessing, found.spec)
    return Encoder(copy.deepcopy(module), preprocessing=preprocessing)


def _adapted(encoder: Encoder, preprocessing: Preprocessing | None, spec: EncoderSpec) -> Encoder:
    return Encoder(
        encoder.backbone,
        preprocessing=preprocessing or encoder.preprocessing,
        pooling=spec.pooling or encoder.pooling,
        spec=encoder.spec,
        origin=encoder.origin,
    )

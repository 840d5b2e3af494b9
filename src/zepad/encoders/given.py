"""An encoder as a user may give it, turned into an `Encoder`."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, ZePADError
from ..seeding import seeded
from .contract import check_contract
from .encoder import Encoder
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

    Returns:
        The encoder. Half precision is converted to float32, in which encoders are trained.

    Raises:
        InputError: If `source` is none of these, or cannot be copied.
        ConfigError: If a spec is wrong.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If pre-trained weights cannot be downloaded.

    Warns:
        UserWarning: If an `Encoder` holds a timm or torchvision model with its classifier.
    """
    if isinstance(source, str):
        source = EncoderSpec.parse(source)
    if isinstance(source, EncoderSpec):
        encoder = build_encoder(source, pretrained=True)
        if preprocess is not None:
            encoder = Encoder(encoder.backbone, preprocessing=preprocess, pooling=encoder.pooling, spec=encoder.spec)
        return _single(encoder)
    if not isinstance(source, nn.Module):
        raise InputError(
            f"{role} must be a torch.nn.Module, an EncoderSpec or a spec string; got {type(source).__name__}. A "
            "function can be wrapped in a module."
        )
    encoder = copied(role, source, preprocess)
    if isinstance(source, Encoder) and source.spec.source == "custom":
        _warn_of_classifier(role, encoder)
    return encoder


def copied(role: str, module: nn.Module, preprocess: Preprocessing | None = None) -> Encoder:
    """Return a copy of a caller's module as an encoder. Half precision is converted to float32.

    Args:
        role: Name of the argument, for messages.
        module: An `Encoder`, or any module from images to features.
        preprocess: Preprocessing of a module that is no `Encoder`; None takes that of its own configuration.

    Raises:
        InputError: If the module cannot be copied, is TorchScript, or has lazy parameters.
    """
    name = type(module.backbone if isinstance(module, Encoder) else module).__name__
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InputError(
            f"{role}: {name} is TorchScript, which cannot be trained as a copy. Pass the module that it was made from."
        )
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise InputError(f"{role}: {name} has lazy parameters without a shape. Call it once with a batch of images.")
    try:
        return _single(copy.deepcopy(module) if isinstance(module, Encoder) else wrap_module(module, preprocess))
    except ZePADError:
        raise
    except Exception as error:
        raise InputError(
            f"{role}: {name} cannot be copied ({error}). Let it keep no tensor that a forward pass computed: replace "
            "torch.nn.utils.weight_norm by torch.nn.utils.parametrizations.weight_norm, and detach what hooks keep."
        ) from error


def examine(role: str, encoder: Encoder) -> tuple[int, int]:
    """Return `(channels, features)` of an encoder that holds to what `check_contract` asks for.

    Args:
        role: Name of the argument, for messages.
        encoder: The encoder, which is not changed.

    Raises:
        InputError: If it does not, or takes no dummy image; the message names the role.
    """
    try:
        return check_contract(encoder)
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _single(encoder: Encoder) -> Encoder:
    half = (torch.float16, torch.bfloat16)
    return encoder.float() if any(weight.dtype in half for weight in encoder.parameters()) else encoder


def _warn_of_classifier(role: str, encoder: Encoder) -> None:
    backbone = encoder.backbone
    with seeded(0):  # a source may build the model anew, with random weights
        kept = backbone.state_dict().keys() - wrap_module(backbone).backbone.state_dict().keys()
    if kept:
        warnings.warn(
            f"{role}: the {type(backbone).__name__} in this Encoder keeps its classifier ({', '.join(sorted(kept))}), "
            "whose outputs are then the features. Pass the model itself, with preprocess=..., and its classifier is "
            "removed; or replace that layer by torch.nn.Identity().",
            UserWarning,
            stacklevel=6,  # the caller of from_encoders
        )

"""The register of sources by name, and building and recognising encoders through it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ...arguments import checked
from ...config import require
from ...errors import ConfigError, ZePADError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import FORMS, WEIGHTS, EncoderSpec, Weights
from .recognition import building_error

Wrap = Callable[[nn.Module], Encoder | None]
"""Copies a module that is the source's own into an encoder, without its classifier; returns None for any other."""


class Build(Protocol):
    """Makes an encoder from a spec."""

    def __call__(self, spec: EncoderSpec, *, pretrained: bool) -> Encoder:
        """Return the encoder, without its classifier and with its own preprocessing, made with `spec=spec`."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    build: Build
    wrap: Wrap | None


_SOURCES: dict[str, _Source] = {}


def register_source(name: str, build: Build, *, wrap: Wrap | None = None, weights: Weights = "fixed") -> None:
    """Make a source of encoders known by name, so that `"name:model"` works wherever an encoder is given.

    A model built from such a spec is saved by its spec. It loads in any process that registered the source before;
    zepad never imports a name from a file, so elsewhere the module itself has to be passed.

    Args:
        name: Name of the source: lower-case letters, digits, `_` and `-`.
        build: `build(spec, *, pretrained)` returns the encoder, made with `spec=spec`. With `pretrained=False` it must
            read no file and no network: the weights are random and are replaced, and it is called once under
            `torch.device("meta")` to learn the shapes. `spec` may come from a file that a stranger wrote: its integers
            are at most 65,536 and its layers at most 256, and `build` must refuse a name or an argument that it does
            not know with a `ConfigError`.
        wrap: `wrap(module)` returns the encoder of a module that is this source's own, or None. Without it, a bare
            module is taken for the caller's.
        weights: How a spec names pre-trained weights: `"fixed"` if the model's name says it all, `"tag"` for
            `"name:model@weights"`, `"file"` or `"repository"` if the architecture is read from the weights, as in
            `"name:path"`.

    Raises:
        ConfigError: If the name is not plain, or another source has it. The same function defined again, as in a
            notebook cell that is run twice, replaces the former one.

    Examples:
        >>> from zepad.encoders import Encoder, SmallResNet, build_encoder
        >>> def build(spec, *, pretrained):
        ...     return Encoder(SmallResNet(**spec.arguments), spec=spec)
        >>> register_source("mylab", build)
        >>> build_encoder(EncoderSpec.parse("mylab:small")).spec.source
        'mylab'
    """
    plain = isinstance(name, str) and bool(re.fullmatch(r"[a-z][a-z0-9_-]*", name)) and name != "custom"
    require(plain, "name", name, 'lower-case letters, digits, "_" and "-", and not "custom"')
    require(weights in WEIGHTS, "weights", weights, f"one of {WEIGHTS}")
    taken = _SOURCES.get(name)
    if taken is not None and _identity(taken.build) != _identity(build):
        raise ConfigError(
            f"the source {name!r} is registered already, by {_identity(taken.build)}. Choose another name."
        )
    _SOURCES[name] = _Source(build=build, wrap=wrap)
    FORMS[name] = weights


def _identity(build: Build) -> str:
    return f"{getattr(build, '__module__', '')}.{getattr(build, '__qualname__', build)}"


@checked
def build_encoder(spec: EncoderSpec, *, pretrained: bool = False) -> Encoder:
    """Build the encoder a spec names, without its classifier and with its own preprocessing.

    Args:
        spec: Spec of any source but `"custom"`. Its preprocessing and pooling, if given, replace the model's own.
        pretrained: Load the source's pre-trained weights, which are downloaded if they are not cached. Otherwise the
            weights are random and the network is not used.

    Raises:
        ConfigError: If the source is not registered, does not know the name, or its package is not installed.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If the weights cannot be downloaded.
    """
    if spec.source == "custom":
        raise ConfigError("a custom encoder can only be built by its owner. Pass the module itself.")
    source = _SOURCES.get(spec.source)
    if source is None:
        raise ConfigError(
            f"no source {spec.source!r} of encoders is registered in this process. Import the package that calls "
            f"zepad.encoders.register_source({spec.source!r}, ...), or pass the module itself."
        )
    try:
        encoder = source.build(spec, pretrained=pretrained)
    except ZePADError:
        raise
    except Exception as error:
        raise building_error(spec, pretrained, error) from error
    if not isinstance(encoder, Encoder) or encoder.spec.source != spec.source:
        raise ConfigError(
            f"the source {spec.source!r} must return an Encoder(..., spec=spec), or it could not be rebuilt; got "
            f"{encoder.spec if isinstance(encoder, Encoder) else type(encoder).__name__}."
        )
    if spec.preprocessing is None and spec.pooling is None:
        return encoder
    return _adapted(encoder, spec.preprocessing, spec)


def wrap_module(module: nn.Module, preprocessing: Preprocessing | None = None) -> Encoder:
    """Copy a module and wrap it, finding source, preprocessing and classifier by itself for known sources.

    A timm or torchvision model loses its classifier in the copy, and a CLIP model its text tower: the image features
    below are what tasks build on. A module of unknown origin is taken as it is and, without a `preprocessing`, as one
    that takes raw pixels.

    Args:
        module: The caller's module; never modified.
        preprocessing: Preprocessing of the module; None takes that of its own configuration.
    """
    for source in _SOURCES.values():
        found = None if source.wrap is None else source.wrap(module)
        if found is not None:
            return found if preprocessing is None else _adapted(found, preprocessing, found.spec)
    return Encoder(copy.deepcopy(module), preprocessing=preprocessing)


def is_registered(source: str) -> bool:
    """Return whether this process can build encoders of a source."""
    return source in _SOURCES


def _adapted(encoder: Encoder, preprocessing: Preprocessing | None, spec: EncoderSpec) -> Encoder:
    return Encoder(
        encoder.backbone,
        preprocessing=preprocessing or encoder.preprocessing,
        pooling=spec.pooling or encoder.pooling,
        spec=encoder.spec,
        origin=encoder.origin,
    )

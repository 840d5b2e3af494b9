"""Descriptions and digests of settings, functions and models, for a report to show and a resumed run to check."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import UniversalPerturbation
from ..digests import digest_tensor, shortened
from ..types import Branched

_PACKAGE = __name__.partition(".")[0]


def describe(value: Any) -> Any:
    """Return a JSON-ready description that differs where the value differs.

    Tensors appear as their digest. Modules and functions appear by name, with a digest of all they depend on: weights
    and settings, or code and what it closes over; a function of this package that closes over nothing is its name.
    """
    return _describe(value, ())


def digest(value: Any) -> str:
    """Return the SHA-256 of a description."""
    return hashlib.sha256(json.dumps(describe(value), sort_keys=True).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state: the same for two modules with the same weights, wherever they are.

    The `settings` of a model of several branches, such as the rule that fuses them, count as state: they decide too.
    """
    settings = [part.settings for part in module.modules() if isinstance(part, Branched)]
    return digest([dict(sorted(module.state_dict().items())), settings])


def _describe(value: Any, inside: tuple[int, ...]) -> Any:
    """Describe a value that is part of those whose ids are `inside`."""
    if id(value) in inside:
        return "itself"
    inner = (*inside, id(value))
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON cannot represent it
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return digest_tensor(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.shape} {value.dtype} ".encode() + value.tobytes()).hexdigest()
    if isinstance(value, UniversalPerturbation):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "provenance"}
        return _describe({**value.provenance, **held}, inner)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, inner) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((_describe(item, inner) for item in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_describe(item, inner) for item in value]
    if isinstance(value, nn.Module):
        return _named(type(value).__name__, _module(value, inner))
    if isinstance(value, (FunctionType, MethodType)):
        return _function(value, inner)
    if isinstance(value, partial):
        return _named("partial", [_describe(part, inner) for part in (value.func, value.args, value.keywords)])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not f.name.startswith("_")}
        return {"attack": type(value).__name__, **_describe(fields, inner)}
    if isinstance(value, (torch.dtype, PurePath, bytes, bytearray, complex)):
        return str(value)
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, type):
        return {"attack": type(value).__qualname__, **_attributes(value, inner)}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _named(name: str, parts: Any) -> str:
    return f"{name} {shortened(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())}"


def _attributes(value: Any, inside: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: _describe(held, inside)
        for name, held in sorted(vars(value).items())
        if not name.startswith("_") and name != "training"
    }


def _module(module: nn.Module, inside: tuple[int, ...]) -> list[Any]:
    """Describe everything a module computes with: its parts, their settings, and every tensor."""
    parts = [
        [name, type(part).__module__, type(part).__qualname__, _attributes(part, inside)]
        for name, part in module.named_modules()
    ]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [parts, [[name, digest_tensor(tensor)] for name, tensor in tensors]]


def _function(value: FunctionType | MethodType, inside: tuple[int, ...]) -> str:
    function = value.__func__ if isinstance(value, MethodType) else value
    assert isinstance(function, FunctionType)
    owner = value.__self__ if isinstance(value, MethodType) else None
    known = function.__module__.partition(".")[0] == _PACKAGE and "<" not in function.__qualname__
    if known and owner is None:
        return function.__qualname__
    around = inspect.getclosurevars(function)
    settings = {  # values among the globals of a function
        name: item
        for name, item in around.globals.items()
        if isinstance(item, (bool, int, float, str, Tensor, nn.Module))
    }
    parts = [function.__module__, _code(function.__code__), owner, function.__defaults__, function.__kwdefaults__]
    return _named(function.__qualname__, _describe([*parts, dict(around.nonlocals), settings], inside))


def _code(code: CodeType) -> list[Any]:
    """Describe what code does, whatever file and line it stands in."""
    constants = [_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]

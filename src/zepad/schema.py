"""Strict reading of JSON into dataclasses: every field is present and of its type, and none is unknown.

A class that is read this way carries `__pydantic_config__ = STRICT`. Its `__post_init__` checks what types cannot say.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from .errors import CheckpointError
from .files import read_bytes

_T = TypeVar("_T")

STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""No conversion between types, no unknown field, no infinity."""

_SHOWN = 3  # number of problems that one message lists


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file that is no larger than `limit` bytes.

    Args:
        path: The file.
        limit: Largest size in bytes that is read.

    Raises:
        CheckpointError: If the file is missing, is larger, is no regular file or cannot be read.
    """
    try:
        return read_bytes(path, limit=limit)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def parse_json(cls: type[_T], text: str | bytes, *, origin: str) -> _T:
    """Return the dataclass that a JSON text spells out.

    Args:
        cls: The dataclass. It and those inside it carry `__pydantic_config__ = STRICT`.
        text: JSON in UTF-8.
        origin: File that holds the text, for error messages.

    Raises:
        CheckpointError: Naming each field that is missing, unknown, of another type or out of range.
    """
    try:
        value: _T = _adapter(cast(Any, cls)).validate_json(text)
        return _complete(value, _adapter(Any).validate_json(text))
    except ValidationError as error:
        raise CheckpointError(f"{origin} is damaged: {describe(error)}. Save or download it again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is damaged: {error}. Save or download it again.") from error


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)  # builds a validator, which takes longer than reading


def _complete(value: _T, given: Any) -> _T:
    """Refuse a text that leaves a field to its default: what was saved must not depend on this version's defaults."""
    missing = sorted(_left_out(value, given, ""))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing[:_SHOWN])}")
    return value


def _left_out(value: Any, given: Any, path: str) -> list[str]:
    if dataclasses.is_dataclass(value) and isinstance(given, dict):
        fields = [field.name for field in dataclasses.fields(value)]
        missing = [f"{path}{name}" for name in fields if name not in given]
        inner = [(getattr(value, name), given[name], f"{path}{name}.") for name in fields if name in given]
    elif isinstance(value, dict) and isinstance(given, dict):
        missing, inner = [], [(item, given[name], f"{path}{name}.") for name, item in value.items()]
    elif isinstance(value, (tuple, list)) and isinstance(given, list):
        missing = []
        inner = [(item, other, f"{path}{i}.") for i, (item, other) in enumerate(zip(value, given, strict=True))]
    else:
        return []
    return missing + [name for part in inner for name in _left_out(*part)]


def describe(error: ValidationError) -> str:
    """Return the first problems that pydantic found, each with the field it is in."""
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or 'the text'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more

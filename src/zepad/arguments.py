"""Arguments of public calls, checked against their annotations: what a signature promises is what the call accepts."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .errors import ConfigError, InputError
from .types import ImageModel

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SHOWN = 80  # characters of a container that a message shows

_WORDS: dict[Any, str] = {
    Any: "anything",
    None: "None",
    bool: "True or False",
    bytes: "bytes",
    float: "a number",
    int: "an integer",
    str: "a string",
    type(None): "None",
    Callable: "a callable",
    Iterable: "an iterable",
    Mapping: "a dict",
    Sequence: "a list",
    Tensor: "a torch.Tensor",
    nn.Module: "a torch.nn.Module",
    dict: "a dict",
    list: "a list",
    tuple: "a tuple",
}
"""What types are called in messages; a type that is not here is called by its name."""


def checked(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a function refuse arguments that are not of their annotated types, before it does anything.

    An `int` or `float` is no `bool` and a `float` is not NaN. Of sequences and mappings every item is checked. Of an
    `Iterable`, which a loader is, and of a `TypeVar` nothing is: the function does that itself.

    The check takes some ten microseconds. It is meant for calls that take far longer, and not for `forward`.

    Raises:
        InputError: If an argument that may be a tensor, a module or a loader is of another type.
        ConfigError: If any other argument is.
    """
    signature = inspect.signature(call)

    @cache
    def annotations() -> dict[str, Any]:
        return get_type_hints(call)  # evaluated at the first call, when every module is imported

    @wraps(call)
    def check_and_call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        hints = annotations()
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                _check(name, value, hints[name])
        return call(*args, **kwargs)

    return check_and_call


def check_fields(settings: DataclassInstance) -> None:
    """Refuse a dataclass with a field that is not of its annotated type, as `checked` refuses an argument.

    Args:
        settings: Object of a dataclass, whose `__post_init__` calls this before it looks at any value.

    Raises:
        InputError: If a field that may be a tensor, a module or a loader is of another type.
        ConfigError: If any other field is.
    """
    hints = _field_types(type(settings))
    for field in dataclasses.fields(settings):
        _check(field.name, getattr(settings, field.name), hints[field.name])


@cache
def _field_types(cls: type[DataclassInstance]) -> dict[str, Any]:
    return get_type_hints(cls)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this machine or this build of PyTorch does not have.

    Raises:
        ConfigError: If a tensor cannot be put there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f'device must be one that is there; got {str(device)!r}: {reason}. Pass "cpu", or None for the default.'
        ) from error


def _check(name: str, value: object, hint: Any) -> None:
    if not _fits(value, hint):
        name, value, hint = _culprit(name, value, hint)
        error = InputError if _is_input(hint) else ConfigError
        raise error(f"{name} must be {_expected(hint)}; got {_got(value)}.{_remedy(value, hint)}")


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value is of an annotated type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, Iterable) or origin is Iterable or origin is type or isinstance(hint, (TypeVar, str)):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, alternative) for alternative in inner)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    if origin is Callable:
        return callable(value)
    accepted = (tuple, list) if origin is tuple else origin or hint  # a list will do for a tuple
    if not isinstance(value, accepted) or (origin is Sequence and isinstance(value, (str, bytes))):
        return False
    if isinstance(value, Mapping) and inner:
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, Sequence) and len(value) == len(inner) and all(map(_fits, value, inner))
    if isinstance(value, Sequence) and inner:
        return all(_fits(item, inner[0]) for item in value)
    return True


def _culprit(name: str, value: object, hint: Any) -> tuple[str, object, Any]:
    """Return name, value and type of what does not fit: an item, if the collection itself is of the right kind."""
    for single in _alternatives(hint):
        origin, inner = get_origin(single), get_args(single)
        items: list[tuple[object, object, Any]] = []
        if origin in (Mapping, dict) and isinstance(value, Mapping):
            items = [(key, item, inner[1]) for key, item in value.items()]
        elif origin in (Sequence, tuple, list) and isinstance(value, (tuple, list)):
            each = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
            items = [(index, item, kind) for index, (item, kind) in enumerate(zip(value, each, strict=False))]
        for key, item, kind in items:
            if not _fits(item, kind):
                return _culprit(f"{name}[{reprlib.repr(key)}]", item, kind)
    return name, value, hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(single for alternative in get_args(hint) for single in _alternatives(alternative))
    return (hint,)


def _is_input(hint: Any) -> bool:
    """Return whether a type is one of images, labels, loaders and encoders, or a collection of them; not a setting."""
    if hint == ImageModel or get_origin(hint) is Iterable:
        return True
    if get_origin(hint) is Callable:
        return False
    return (isinstance(hint, type) and issubclass(hint, (Tensor, nn.Module))) or any(map(_is_input, get_args(hint)))


def _expected(hint: Any) -> str:
    words = list(dict.fromkeys(word for single in _alternatives(hint) for word in _words(single)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(hint: Any) -> list[str]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [f'"{allowed}"' if isinstance(allowed, str) else repr(allowed) for allowed in inner]
    kind = origin or hint
    name = _WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    if kind in (Mapping, dict) and inner:
        return [f"{name} {{{_expected(inner[0])}: {_expected(inner[1])}}}"]
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return [f"{name} ({', '.join(map(_expected, inner))})"]
    if kind in (Sequence, list, tuple) and inner:
        return [f"{name} [{_expected(inner[0])}, ...]"]
    return [name]


def _got(value: object) -> str:
    """Return a short description of a value: plain values as they are written, others by their type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        return reprlib.repr(value)
    if isinstance(value, (tuple, list, dict)):
        return f"the {type(value).__name__} {' '.join(reprlib.repr(value).split())[:_SHOWN]}"
    return f"an object of type {type(value).__name__}"


def _remedy(value: object, hint: Any) -> str:
    """Return what to write instead, where that can be told; otherwise what was expected says it."""
    kinds = _alternatives(hint)
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    if isinstance(value, type) and classes:
        return f" Pass an object, such as {value.__name__}(...)."
    if nn.Module in kinds and callable(value):
        return " Wrap it in a torch.nn.Module."
    made_of = [kind.__name__ for kind in classes if dataclasses.is_dataclass(kind)]
    if isinstance(value, dict) and made_of:
        return f" Write {made_of[0]}(**settings) for a dict of settings."
    wanted = next((kind.__name__ for kind in (int, float) if kind in kinds), None)
    if wanted and isinstance(value, str) and value.strip():
        return " Write a number, without quotes."
    if wanted and isinstance(value, float) and value.is_integer():
        return f" Write {value:.0f}."
    if wanted and not isinstance(value, (bool, float)) and (hasattr(value, "__index__") or hasattr(value, "item")):
        return f" Convert it with {wanted}(...)."
    if bool in kinds and isinstance(value, (int, str)):
        return " Write True or False, without quotes."
    return ""

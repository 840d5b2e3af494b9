"""Normalisations in the transforms behind a loader, found so that an error can say which one to leave out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_DEPTH = 6  # how far transforms may be nested in each other
_HOLDERS = ("dataset", "datasets", "collate_fn", "transform", "transforms", "func", "preprocess", "processor")
"""Attributes under which loaders, data sets and transforms hold what is applied to images."""

_ANYWHERE = (
    "Remove Normalize from torchvision's and albumentations' transforms; write create_transform(..., normalize=False) "
    "with timm, and processor(..., do_normalize=False) with the image processors of transformers."
)


def how_to_leave_out(source: object) -> str:
    """Return in a sentence how to turn off the normalisation that is found in a source, or any of the common ones.

    Args:
        source: A loader, or anything else that yielded normalised images; None where nothing is known of it.
    """
    try:
        return next((advice for part in _parts(source, _DEPTH, set()) if (advice := _advice(part))), _ANYWHERE)
    except Exception:  # attributes of a stranger's class may raise anything, and an error is being told already
        return _ANYWHERE


def _advice(part: object) -> str | None:
    """Return what to do about a transform, or None if it does not normalise."""
    kind = type(part)
    library, name = kind.__module__.partition(".")[0], kind.__name__
    if name == "Normalize":
        return f"The loader's transforms hold {_called(library, part)}: remove it{_in_timm(part)}."
    if name == "ImageClassification" and library == "torchvision":
        return (
            f"The loader's transforms are those of torchvision's weights, {_called('', part)}: make them with "
            "weights.transforms(mean=(0, 0, 0), std=(1, 1, 1))."
        )
    if getattr(part, "do_normalize", None) is True:
        return f"The loader's transforms call {_called(library, part)}: set do_normalize=False in it."
    return None


def _called(library: str, part: object) -> str:
    owner = f"{library}'s " if library in ("torchvision", "albumentations", "transformers", "timm", "kornia") else ""
    mean, std = (getattr(part, name, getattr(part, f"image_{name}", None)) for name in ("mean", "std"))
    return f"{owner}{type(part).__name__}(mean={_numbers(mean)}, std={_numbers(std)})"


def _numbers(values: Any) -> str:
    try:
        return f"({', '.join(f'{float(value):.3g}' for value in torch.as_tensor(values).flatten()[:4])})"
    except (TypeError, ValueError, RuntimeError):
        return "..."


def _in_timm(part: object) -> str:
    # timm makes its transforms of torchvision's.
    return (
        ", or write normalize=False in timm's create_transform" if torch.is_tensor(getattr(part, "mean", None)) else ""
    )


def _parts(source: object, depth: int, seen: set[int]) -> Iterator[object]:
    """Iterate over an object and what it applies to images, from the outside in."""
    if depth < 0 or id(source) in seen or isinstance(source, (str, bytes, torch.Tensor, type, ModuleType)):
        return
    seen.add(id(source))
    yield source
    for held in _held(source):
        yield from _parts(held, depth - 1, seen)


def _held(source: object) -> Iterator[object]:
    if isinstance(source, (list, tuple)):
        yield from source[:100]
    elif isinstance(source, MethodType):
        yield from (source.__self__, source.__func__)
    elif isinstance(source, FunctionType):
        # A function that makes tensors of a batch, as `set_transform` of Hugging Face data sets takes one, calls a
        # processor that it finds outside.
        known = inspect.getclosurevars(source)
        yield from known.nonlocals.values()
        yield from known.globals.values()
    elif isinstance(source, functools.partial):
        yield from (source.func, *source.keywords.values())
    elif isinstance(source, nn.Sequential):
        yield from source
    else:
        yield from (getattr(source, name) for name in _HOLDERS if hasattr(source, name))
        form = getattr(source, "format", None)  # of a Hugging Face data set
        if isinstance(form, Mapping):
            yield form.get("format_kwargs", {}).get("transform")

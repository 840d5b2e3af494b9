"""Images as callers have them: files, PIL images, arrays, tensors, lists of these, or loaders of batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..inputs import check_images, scaled
from ..types import Loader
from .images import from_pil, read_image

Given: TypeAlias = Image.Image | NDArray[Any] | str | Path | Tensor | Loader
"""One image, a list of images, a batch of images or a loader of batches."""

_TOGETHER = 2**26  # numbers in the images of a list that are read before the model sees them: 256 MB


class Batches(NamedTuple):
    """Images as batches.

    Attributes:
        batches: A batch or the loader as it was given, or an iterator of batches `(N, C, H, W)`.
        single: Whether one image was given, and no batch of one.
    """

    batches: Tensor | Loader
    single: bool


def as_batches(
    images: Given,
    *,
    channels: int | None = None,
    mixed: bool = False,
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Batches:
    """Bring images into the form of batches `(N, C, H, W)`. Batches and loaders are passed on as they are.

    Args:
        images: One of

            - a PIL image;
            - the path of an image file, which is read as `read_image` reads it;
            - an array `(H, W)`, `(H, W, C)` or `(N, H, W, C)`, uint8 or float in [0, 1]. Grey becomes as many equal
              channels as needed, and a fourth channel is dropped;
            - a tensor `(C, H, W)`, uint8 or float in [0, 1];
            - a list or tuple of these, read a part at a time;
            - a tensor `(N, C, H, W)`, or a loader.
        channels: Number of channels that the images get; None leaves tensors as they are and makes others coloured.
        mixed: Whether the images of a list may differ in size, because the model brings them to its own.
        resize: Function that does the same beforehand, `(N, C, H, W)` to `(N, C, H, W)`, so that images of several
            sizes become one batch; None where the model has several sizes of its own, or none.

    Returns:
        The batches, and whether one image was given.

    Raises:
        InputError: If an image cannot be read or does not fit, or the images of a list differ in size and may not. For
            a list this is found out when the image is reached.
    """
    if isinstance(images, (list, tuple)) and images and _is_image(images[0]):
        return Batches(_listed(images, channels, mixed, resize), single=False)
    if _is_image(images):
        return Batches(iter([_read(images, channels)]), single=not (isinstance(images, np.ndarray) and images.ndim > 3))
    return Batches(images, single=False)  # type: ignore[arg-type]


def _is_image(given: object) -> bool:
    """Return whether something is an image, or an array of several, and no batch of a loader's."""
    if isinstance(given, Tensor):
        return given.ndim == 3
    return isinstance(given, (str, os.PathLike, Image.Image, np.ndarray))


def _listed(
    items: Sequence[Any], channels: int | None, mixed: bool, resize: Callable[[Tensor], Tensor] | None
) -> Iterator[Tensor]:
    pending: list[Tensor] = []
    for index, item in enumerate(items):
        try:
            images = _read(item, channels)
        except InputError as error:
            raise InputError(f"images[{index}]: {error}") from error
        if resize is not None:
            images = resize(images)
        fits = not pending or images.shape[1:] == pending[0].shape[1:]
        if not (fits or mixed):
            here, there = (" x ".join(map(str, part.shape[2:])) for part in (images, pending[0]))
            raise InputError(
                f"images[{index}] is {here} and those before it are {there} (height x width), and not every encoder "
                "states an input size to bring them to. Resize them to the size that the model was trained on, as "
                "with image.resize((width, height))."
            )
        if pending and not (fits and sum(part.numel() for part in pending) + images.numel() <= _TOGETHER):
            yield torch.cat(pending)
            pending = []
        pending.append(images.to(pending[0].device) if pending else images)
    yield torch.cat(pending)


def _read(given: Any, channels: int | None) -> Tensor:
    """Return one image, or an array of several, as a checked batch."""
    if isinstance(given, (str, os.PathLike)):
        return read_image(_file(Path(given)), channels=channels or 3)[None]
    if isinstance(given, Image.Image):
        return check_images(from_pil(given, channels=channels or 3)[None])
    if isinstance(given, np.ndarray):
        return check_images(_from_array(given, channels or 3), channels=channels)
    if isinstance(given, Tensor) and given.ndim == 3:
        _check_channels(tuple(given.shape), channels)
        return check_images(scaled(given)[None], channels=channels)
    shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
    raise InputError(
        f"one image must be a PIL image, a path, an array or a tensor (C, H, W); got {type(given).__name__}{shape}. "
        "Of a pair (image, label) pass the image alone."
    )


def _file(path: Path) -> Path:
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; expected an image file. Pass the files in a list, such as "
            f"sorted(Path({str(path)!r}).glob('*.jpg'))."
        )
    return path


def _from_array(array: NDArray[Any], channels: int) -> Tensor:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(
            f"an array of pixels must be uint8, or float in [0, 1]; got dtype {array.dtype}. Convert whole numbers "
            "from 0 to 255 with array.astype('uint8')."
        )
    stacked = array[..., None] if array.ndim == 2 else array
    if stacked.ndim not in (3, 4) or stacked.shape[-1] not in (1, 3, 4, channels):
        raise InputError(
            f"an array must have shape (H, W), (H, W, C) or (N, H, W, C) with 1, 3 or 4 channels; got {array.shape}. "
            "Pass channels first as a tensor: torch.from_numpy(array)."
        )
    if stacked.shape[-1] == 4 and channels != 4:
        stacked = stacked[..., :3]
    if stacked.shape[-1] == 1:
        stacked = np.broadcast_to(stacked, (*stacked.shape[:-1], channels))
    pixels = torch.from_numpy(stacked.astype(np.float32, order="C"))
    if array.dtype == np.uint8:
        pixels /= 255
    return (pixels if pixels.ndim == 4 else pixels[None]).permute(0, 3, 1, 2)


def _check_channels(shape: tuple[int, ...], channels: int | None) -> None:
    """Refuse the tensor of one image with other channels, in the terms of one image."""
    if channels is None or shape[0] == channels:
        return
    if shape[2] == channels:
        hint = ", which looks like (H, W, C). Use image.permute(2, 0, 1)."
    else:
        hint = ". Repeat the grey channel with image.expand(3, -1, -1)." if shape[0] == 1 else "."
    raise InputError(f"the tensor of one image must have shape ({channels}, H, W); got {shape}{hint}")

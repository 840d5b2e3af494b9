"""Images in a NumPy `.npz` file, as arrays of pixels or as encoded image files joined together."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..inputs import check_images, check_labels
from .images import ArrayImages, EncodedImages

_KEYS = "either images and labels, or webp (or encoded), offsets and labels; classes is optional"


def read_npz(path: Path) -> tuple[ArrayImages | EncodedImages, Tensor, list[str]]:
    """Read images, labels and class names from a `.npz` file into memory; encoded images stay encoded.

    Nothing is ever unpickled. The file has the keys:

    - `images`: uint8, or float in [0, 1]; `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)` with 1 or 3 channels.
    - or `webp` (or `encoded`), uint8 `(bytes,)`: image files of any format, one after the other, and `offsets`,
      integers `(N + 1,)`: file `i` lies from `offsets[i]` to `offsets[i + 1]`.
    - `labels`: integers `(N,)`.
    - `classes`, optional: one string per class. Without it the classes are called `"0"`, `"1"`, ...

    Raises:
        InputError: If the file is malformed; the message names the key.
    """
    arrays, found = _read(path)
    if "labels" not in arrays:
        raise InputError(f"{path} has no key labels; it has {found}, and needs {_KEYS}.")
    pictures: ArrayImages | EncodedImages
    if "images" in arrays:
        pictures = _pixels(path, arrays["images"])
    else:
        key = "webp" if "webp" in arrays else "encoded"
        if not {key, "offsets"} <= set(arrays):
            raise InputError(f"{path} has no images; it has {found}, and needs {_KEYS}.")
        pictures = _encoded(path, key, arrays[key], arrays["offsets"])
    classes = _classes(path, arrays["classes"]) if "classes" in arrays else None
    labels = _labels(path, arrays["labels"], len(pictures), classes)
    return pictures, labels, classes or [str(label) for label in range(int(labels.max()) + 1)]


def _read(path: Path) -> tuple[dict[str, NDArray[np.generic]], str]:
    wanted = ("images", "webp", "encoded", "offsets", "labels", "classes")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError(f"{path} is no .npz file, or is cut short. Write it with numpy.savez.")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files if name in wanted}
                return arrays, ", ".join(sorted(stored.files)) or "nothing"
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; expected a .npz file with {_KEYS}.") from error
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be read: {error} Write it with numpy.savez, from arrays of numbers or strings alone: "
            "objects are never unpickled."
        ) from error


def _pixels(path: Path, images: NDArray[np.generic]) -> ArrayImages:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4:
        raise InputError(
            f"images in {path} must have shape (N, H, W), (N, H, W, C) or (N, C, H, W); got {images.shape}."
        )
    else:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first == last:
            problem = "no axis of 1 or 3 channels" if not first else "two axes that could be the channels"
            raise InputError(
                f"images in {path} must have shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; got "
                f"{images.shape}, which has {problem}."
            )
        if last:
            images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(
            f"images in {path} must be uint8, or float in [0, 1]; got {images.dtype}. Convert with "
            ".astype(numpy.uint8) if they run from 0 to 255."
        )
    if images.size == 0:
        raise InputError(f"images in {path} must not be empty; got shape {images.shape}.")
    if images.dtype != np.uint8:
        try:
            check_images(torch.from_numpy(images.astype(np.float32)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        images = images.clip(0, 1)
    return ArrayImages(images)


def _encoded(path: Path, key: str, joined: NDArray[np.generic], offsets: NDArray[np.generic]) -> EncodedImages:
    if joined.dtype != np.uint8 or joined.ndim != 1:
        raise InputError(f"{key} in {path} must be uint8 of shape (bytes,); got {joined.dtype} {joined.shape}.")
    if not np.issubdtype(offsets.dtype, np.integer) or offsets.ndim != 1 or len(offsets) < 2:
        raise InputError(
            f"offsets in {path} must be integers of shape (N + 1,), N at least 1; got {offsets.dtype} {offsets.shape}."
        )
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(joined) or (np.diff(ends) <= 0).any():
        raise InputError(
            f"offsets in {path} must rise from 0 to the {len(joined)} bytes of {key}; they run from {ends[0]} to "
            f"{ends[-1]}{'' if (np.diff(ends) > 0).all() else ' and do not always rise'}."
        )
    return EncodedImages(str(path), joined.astype(np.uint8, copy=False), ends)


def _labels(path: Path, labels: NDArray[np.generic], count: int, classes: list[str] | None) -> Tensor:
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels in {path} must be integers of shape ({count},), one per image; got {labels.dtype} "
            f"{labels.shape}. Number the classes from 0 and store their names under classes."
        )
    try:
        return check_labels(
            torch.from_numpy(labels.astype(np.int64)),
            count=count,
            num_classes=None if classes is None else len(classes),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _classes(path: Path, classes: NDArray[np.generic]) -> list[str]:
    if classes.ndim != 1 or classes.dtype.kind not in "US" or not len(classes):
        raise InputError(f"classes in {path} must be strings of shape (classes,); got {classes.dtype} {classes.shape}.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in classes.tolist()]

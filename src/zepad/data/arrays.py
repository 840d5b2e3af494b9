"""Images in a NumPy `.npz` file, as arrays of pixels or as encoded image files joined together."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..files import open_regular
from ..inputs import check_images, check_labels
from .images import ArrayImages, EncodedImages, check_names

_KEYS = "either images and labels, or webp (or encoded), offsets and labels; classes is optional"

_MAX_BYTES = 2**36
_MAX_UNPACKED, _MAX_RATIO = 2**30, 100  # more bytes than the first, at more than this ratio, are no images but a trap
_MAX_CLASSES = 2**16  # three times those of ImageNet-21k
_HEADERS: dict[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path) -> tuple[ArrayImages | EncodedImages, Tensor, list[str]]:
    """Read images, labels and class names from a `.npz` file into memory; encoded images stay encoded.

    Nothing is ever unpickled. The file has the keys:

    - `images`: uint8, or float in [0, 1]; `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)` with 1 or 3 channels.
    - or `webp` (or `encoded`), uint8 `(bytes,)`: image files as `read_image` reads them, one after the other, and
      `offsets`, integers `(N + 1,)`: file `i` lies from `offsets[i]` to `offsets[i + 1]`.
    - `labels`: integers `(N,)`, below 65,536.
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
    return pictures, labels, classes or _numbered(path, labels)


def _read(path: Path) -> tuple[dict[str, NDArray[np.generic]], str]:
    wanted = ("images", "webp", "encoded", "offsets", "labels", "classes")
    try:
        with open_regular(path, limit=_MAX_BYTES) as file:
            if not zipfile.is_zipfile(file):
                raise InputError(f"{path} is no .npz file, or is cut short. Write it with numpy.savez.")
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
                keys = [member.filename.removesuffix(".npy") for member in members]
                chosen = {key: member for key, member in zip(keys, members, strict=True) if key in wanted}
                _check_members(path, keys, list(chosen.values()))
                arrays = {key: _array(path, key, archive, member) for key, member in chosen.items()}
                return arrays, ", ".join(sorted(keys)) or "nothing"
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; expected a .npz file with {_KEYS}.") from error
    except InputError:
        raise
    except Exception as error:  # a damaged archive or header can raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{path} cannot be read: {reason}. Write it with numpy.savez, from arrays of numbers or strings alone: "
            "objects are never unpickled."
        ) from error


def _check_members(path: Path, keys: list[str], members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive that holds a key twice, is packed as numpy never packs, or unpacks to a multiple of its size.

    Raises:
        InputError: Naming the key.
    """
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise InputError(f"{path} holds {twice[0]} more than once. Write it with numpy.savez.")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise InputError(f"{path} is packed in another way than numpy packs. Write it with numpy.savez_compressed.")
    unpacked, packed = (sum(getattr(m, size) for m in members) for size in ("file_size", "compress_size"))
    if unpacked > max(_MAX_UNPACKED, _MAX_RATIO * packed):
        raise InputError(
            f"{path} would unpack from {packed:,} to {unpacked:,} bytes, which no images do. Write it with numpy.savez."
        )


def _array(path: Path, key: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[np.generic]:
    """Read one array, after its header has been compared with the bytes that follow: numpy makes room before it reads.

    Raises:
        InputError: If the header claims objects, or another size than there is.
    """
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise InputError(f"{key} in {path} is a structured array. Store plain numbers or strings.")
        shape, _, dtype = _HEADERS[version](file)
        held = member.file_size - file.tell()
    if dtype.hasobject:
        raise InputError(f"{key} in {path} holds objects, which are never unpickled. Store plain numbers or strings.")
    if min(shape, default=0) < 0 or not dtype.itemsize or math.prod(shape) * dtype.itemsize != held:
        raise InputError(
            f"{key} in {path} claims shape {shape} of {dtype.itemsize} bytes each, and {held:,} bytes follow. "
            "Write it with numpy.savez."
        )
    with archive.open(member) as file:
        array: NDArray[np.generic] = npy.read_array(file, allow_pickle=False)
        return array


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
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
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
    if labels.dtype.kind not in "iu":
        raise InputError(
            f"labels in {path} must be integers of shape ({count},), one per image; got {labels.dtype} "
            f"{labels.shape}. Number the classes from 0 and store their names under classes."
        )
    try:
        return check_labels(
            torch.from_numpy(labels.astype(np.int64)),
            count=count,
            num_classes=_MAX_CLASSES if classes is None else len(classes),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _classes(path: Path, classes: NDArray[np.generic]) -> list[str]:
    if classes.ndim != 1 or classes.dtype.kind not in "US" or not 0 < len(classes) <= _MAX_CLASSES:
        raise InputError(
            f"classes in {path} must be strings of shape (classes,), {_MAX_CLASSES:,} at most; got {classes.dtype} "
            f"{classes.shape}."
        )
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in classes.tolist()]
    except (ValueError, SystemError) as error:  # bytes that are no UTF-8, or numbers that are no characters
        raise InputError(f"classes in {path} are no text: {error}. Store them as strings.") from error
    return check_names(path, names)


def _numbered(path: Path, labels: Tensor) -> list[str]:
    """Return the numbers of the classes as their names, and say so where some have no image."""
    counts = torch.bincount(labels)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(
            f"{path} has {len(counts)} classes by its largest label, and no image of {len(absent)} of them ({shown}). "
            "Number the classes without gaps, or store the names of all of them under classes.",
            stacklevel=2,
        )
    return [str(label) for label in range(len(counts))]

"""One function for every data set: `load_data("cifar10", "train")`, `load_data("folder:birds", "test")`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..arguments import checked
from ..config import require
from ..errors import ConfigError, InputError
from .arrays import read_npz
from .embedded import digits
from .folders import check_classes, read_folder, split_folders
from .images import EncodedImages, ImageDataset, ImageFiles, Pictures
from .published import read_published

Split = Literal["train", "test", "all"]
Part = Literal["train", "validation", "test", "all"]

NAMES = ("digits", "cifar10", "stl10", "gtsrb", "svhn", "animals10", "imagenet20")
"""The data sets that have a name of their own."""

_MIXED_SIZES = ("gtsrb", "animals10", "imagenet20")
_ANIMALS = (
    "cane",
    "cavallo",
    "elefante",
    "farfalla",
    "gallina",
    "gatto",
    "mucca",
    "pecora",
    "ragno",
    "scoiattolo",
)
_WNID = re.compile(r"n\d{8}")
_ORIGIN = {
    "animals10": "Kaggle (alessiocorrado99/animals10, folder raw-img)",
    "imagenet20": "ImageNet (image-net.org), 20 of its classes",
}
_TEST_SHARE = 5  # one image in five is held out where a source has no split of its own
_VALIDATION_SHARE = 10  # one training image in ten is for calibration where a caller asks for such a part


@checked
def load_data(
    source: str | Path,
    split: Split,
    *,
    size: int | tuple[int, int] | None = None,
    root: str | Path | None = None,
    download: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Load a data set by name, from a folder of images or from a `.npz` file. docs/data.md has the layouts.

    Images of gtsrb and of folders are read from disk one at a time; all others are held in memory.

    Args:
        source: One of

            - `"digits"`, which comes with scikit-learn;
            - `"cifar10"`, `"stl10"`, `"svhn"`, `"gtsrb"`, read by torchvision, in its layout below `root`;
            - `"animals10"`, `"imagenet20"`: `root/<name>/{train,test}/<class>/*.jpg`, or `root/<name>/<class>/*.jpg`.
              Animals-10 has the ten class folders of Kaggle's archive (`cane` to `scoiattolo`); ImageNet20 is
              whichever 20 class folders of ImageNet (`n01440764`, ...) are there;
            - `"folder:PATH"`: `PATH/{train,test}/<class>/` or `PATH/<class>/`, images as `read_image` reads them;
            - `"npz:PATH"`, or a path that ends in `.npz`: `images` or `webp` and `offsets`, and `labels`. `{split}` in
              the path stands for the name of the split, if each split has a file of its own.
        split: `"train"` or `"test"`. A folder or file without a split of its own is split at random, class by class:
            one image in five, always the same ones, is for testing. `"all"` takes such a source whole.
        size: Height and width that every image is stretched to (bilinear, antialiased), or one number for both. None
            keeps the images' own, which must then all be the same; for gtsrb, animals10 and imagenet20 None means 64,
            the size in the paper.
        root: Folder of the named data sets; None takes the environment variable `ZEPAD_DATA`, else
            `~/.cache/zepad/data`.
        download: Fetch cifar10, stl10, svhn or gtsrb where files are missing. The others are never downloaded.
        limit: Take a random subset of at most this many images. A smaller one is part of a larger one.
        seed: Seed of the random subset. It does not change what is train and what is test.

    Returns:
        A map-style data set of `(image, label)`, float32 `(3, H, W)` in [0, 1] and int, with `.classes`.

    Raises:
        ConfigError: If a setting is out of range or the source unknown.
        InputError: If files are missing, damaged or laid out in another way.

    Examples:
        >>> data = load_data("digits", "test", limit=100)
        >>> image, label = data[0]
        >>> image.shape, len(data), data.classes[:3]
        (torch.Size([3, 32, 32]), 100, ['0', '1', '2'])

    References:
        The data sets of ZePAD (ICLR 2026, arXiv 2602.11204), which stretches all images to 64x64.
    """
    require(
        split in ("train", "test", "all"), "split", split, '"train" or "test" (or "all" for a source without split)'
    )
    require(limit is None or _positive(limit), "limit", limit, "a number of images of at least 1, or None")
    require(isinstance(seed, int), "seed", seed, "an integer")
    kind, place = _parse(source)
    data = _open(kind, place, split, _shape(kind, size), _root(root), download)
    data = _limited(data, limit, seed)
    if data.size is None and isinstance(data.pictures, (ImageFiles, EncodedImages)):
        _check_one_size(data.pictures, data.indices)
    return data


@checked
def load_part(
    source: str | Path,
    part: Part,
    *,
    size: int | tuple[int, int] | None = None,
    root: str | Path | None = None,
    download: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Load a part of a data set for somebody who trains, calibrates and tests: three parts that share no image.

    Args:
        source: Name of a data set, `"folder:PATH"` or the path of a `.npz` file, as `load_data` takes them.
        part: `"validation"` is one image in ten of the train split, class by class, always the same ones, and `"train"`
            is the rest of it. `"test"` and `"all"` are those of `load_data`.
        size: Height and width that every image is stretched to, or one number for both. None keeps the images' own.
        root: Folder of the named data sets; None takes the same one as `load_data`.
        download: Fetch a named data set where files are missing.
        limit: Take a random subset of at most this many images.
        seed: Seed of the random subset. It does not change which images belong to which part.

    Returns:
        A map-style data set as from `load_data`.

    Raises:
        ConfigError: If a setting is out of range or the source unknown.
        InputError: If files are missing, damaged or laid out in another way, or no class has images for validation.

    Examples:
        >>> [len(load_part("digits", part)) for part in ("train", "validation", "test")]
        [1170, 130, 497]
    """
    require(part in get_args(Part), "part", part, ", ".join(get_args(Part)))
    place: Any = {"size": size, "root": root, "download": download, "seed": seed}
    if part in ("test", "all"):
        return load_data(source, part, limit=limit, **place)
    require(limit is None or _positive(limit), "limit", limit, "a number of images of at least 1, or None")
    whole = load_data(source, "train", **place)
    held_out = _every_class(whole.labels, len(whole.classes))
    if part == "train":
        return _limited(whole.select((~held_out).nonzero().flatten()), limit, seed)
    if not held_out.any():
        raise InputError(
            f"no class of {source} has the two training images of which one could be held out for validation. Add "
            "images, or name other ones that no training has seen."
        )
    return _limited(whole.select(held_out.nonzero().flatten()), limit, seed)


def _every_class(labels: Tensor, classes: int) -> Tensor:
    """Return which images are for validation, bool `(N,)`: one in ten of each class, and none of a single one."""
    generator = torch.Generator().manual_seed(0)  # not the caller's seed: the parts must never overlap
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        own = (labels == label).nonzero().flatten()
        count = max(1, round(len(own) / _VALIDATION_SHARE)) if len(own) > 1 else 0
        held_out[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return held_out


def _limited(data: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    if limit is None or limit >= len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.select(order[:limit].sort().values)


def _open(
    kind: str, place: str, split: Split, size: tuple[int, int] | None, root: Path, download: bool
) -> ImageDataset:
    if kind in ("folder", "animals10", "imagenet20"):
        return _folder(kind, Path(place).expanduser() if kind == "folder" else root / kind, split, size)
    if kind == "npz":
        path = Path(place.replace("{split}", split)).expanduser()
        if "{split}" in place:
            _own_split(split, f"npz:{place}")
        return _whole_or_part(*read_npz(path), size, path, "all" if "{split}" in place else split)
    own = _own_split(split, kind)
    if kind == "digits":
        images = digits(own, size=size or 32)
        return ImageDataset(images.images, images.labels, images.classes)
    pictures, labels, classes = read_published(kind, root, own, download=download)
    return ImageDataset(pictures, labels, classes, size=size)


def _folder(kind: str, path: Path, split: Split, size: tuple[int, int] | None) -> ImageDataset:
    if kind != "folder" and not path.is_dir():
        raise InputError(
            f"{kind} is not at {path}: expected {path}/train/<class>/*.jpg and {path}/test/<class>/*.jpg, or "
            f"{path}/<class>/*.jpg. It cannot be downloaded from here: get the images from {_ORIGIN[kind]}, or pass "
            "root= (--root) the folder that has them."
        )
    halves = split_folders(path)
    if halves is not None:
        path = halves[0] if _own_split(split, str(path)) == "train" else halves[1]
    pictures, labels, classes = read_folder(path)
    if kind == "animals10":
        check_classes(path, classes, _ANIMALS)
    if kind == "imagenet20" and (len(classes) != 20 or not all(map(_WNID.fullmatch, classes))):
        others = [name for name in classes if not _WNID.fullmatch(name)]
        raise InputError(
            f"{path} must have 20 class folders named by ImageNet ids such as n01440764; it has {len(classes)}"
            f"{f', of which {chr(44).join(others[:10])} are no such ids' if others else ''}. Add or remove folders, or "
            "read them as they are with 'folder:PATH'."
        )
    return _whole_or_part(pictures, labels, classes, size, path, split if halves is None else "all")


def _whole_or_part(
    pictures: Pictures, labels: Tensor, classes: list[str], size: tuple[int, int] | None, path: Path, split: Split
) -> ImageDataset:
    data = ImageDataset(pictures, labels, classes, size=size)
    return data if split == "all" else data.select(_part(labels, classes, path, split))


def _part(labels: Tensor, classes: list[str], path: Path, split: Literal["train", "test"]) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # not the caller's seed: train and test must never overlap
    parts = []
    members = labels.argsort(stable=True).split(torch.bincount(labels, minlength=len(classes)).tolist())
    for name, where in zip(classes, members, strict=True):
        if len(where) == 1:
            raise InputError(
                f"class {name!r} of {path} has one image alone, which cannot be split into train and test. Add images, "
                "lay out train and test yourself, or pass split='all' to take every image."
            )
        order = where[torch.randperm(len(where), generator=generator)]
        held_out = max(1, round(len(where) / _TEST_SHARE)) if len(where) else 0
        parts.append(order[:held_out] if split == "test" else order[held_out:])
    return torch.cat(parts).sort().values


def _check_one_size(pictures: ImageFiles | EncodedImages, indices: Tensor) -> None:
    first, *rest = indices.tolist()
    height, width = pictures.shape(first)
    for index in rest:
        if pictures.shape(index) != (height, width):
            other_height, other_width = pictures.shape(index)
            raise InputError(
                f"images differ in size: {pictures.name(first)} is {height} x {width}, {pictures.name(index)} is "
                f"{other_height} x {other_width} (height x width). "
                "Pass size= (--size), such as 64, to stretch all to one."
            )


def _parse(source: str | Path) -> tuple[str, str]:
    if isinstance(source, Path):
        return ("npz" if source.suffix == ".npz" else "folder"), str(source)
    require(isinstance(source, str), "source", source, "a string or a path")
    kind, colon, place = source.partition(":")
    if colon and kind in ("folder", "npz"):
        require(bool(place), "source", source, f"'{kind}:PATH', with a path")
        return kind, place
    if source.endswith(".npz"):
        return "npz", source
    if source not in NAMES:
        hint = f" To read this folder, write 'folder:{source}'." if source and Path(source).is_dir() else ""
        raise ConfigError(
            f"source must be one of {', '.join(NAMES)}, 'folder:PATH' or 'npz:PATH'; got {source!r}.{hint}"
        )
    return source, ""


def _own_split(split: Split, name: str) -> Literal["train", "test"]:
    if split == "all":
        raise ConfigError(f"split='all' is for a source without a split of its own; {name} has train and test.")
    return split


def _shape(kind: str, size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return (64, 64) if kind in _MIXED_SIZES else None
    expected = "a positive integer, or (height, width)"
    if isinstance(size, int):
        require(_positive(size), "size", size, expected)
        return size, size
    require(isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_positive, size)), "size", size, expected)
    return size[0], size[1]


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("ZEPAD_DATA") or "~/.cache/zepad/data").expanduser()

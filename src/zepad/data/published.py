"""Published data sets, which torchvision downloads, checks and reads."""

from __future__ import annotations

import csv
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..inputs import check_labels
from .images import ArrayImages, ImageFiles, Pictures

_PLACES = {
    "cifar10": {"train": "cifar-10-batches-py", "test": "cifar-10-batches-py"},
    "stl10": {"train": "stl10_binary", "test": "stl10_binary"},
    "svhn": {"train": "train_32x32.mat", "test": "test_32x32.mat"},
    "gtsrb": {"train": "gtsrb/GTSRB/Training", "test": "gtsrb/GTSRB/Final_Test/Images"},
}
GTSRB_IMAGES = {"train": 26_640, "test": 12_630}
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
# fmt: off
_SIGNS = (
    "speed limit 20 km/h", "speed limit 30 km/h", "speed limit 50 km/h", "speed limit 60 km/h", "speed limit 70 km/h",
    "speed limit 80 km/h", "end of speed limit 80 km/h", "speed limit 100 km/h", "speed limit 120 km/h",
    "no overtaking", "no overtaking by lorries", "right of way at next crossing", "priority road", "give way", "stop",
    "no vehicles", "no lorries", "no entry", "general danger", "bend to the left", "bend to the right", "double bend",
    "bumpy road", "slippery road", "road narrows on the right", "road works", "traffic lights", "pedestrians",
    "children", "bicycles", "ice or snow", "wild animals", "end of all limits", "turn right ahead", "turn left ahead",
    "ahead only", "ahead or right", "ahead or left", "keep right", "keep left", "roundabout", "end of no overtaking",
    "end of no overtaking by lorries",
)
# fmt: on

# What torchvision raises for files missing, damaged or out of reach; the last four for gtsrb's table of labels.
_FAILURES = (RuntimeError, OSError, HTTPException, KeyError, TypeError, ValueError, csv.Error)


def read_published(
    name: str, root: Path, split: Literal["train", "test"], *, download: bool
) -> tuple[Pictures, Tensor, list[str]]:
    """Read a published data set with torchvision, in its layout below `root`.

    Args:
        name: `"cifar10"`, `"stl10"`, `"svhn"` or `"gtsrb"`.
        root: Folder that holds all data sets.
        split: `"train"` or `"test"`.
        download: Fetch missing files; torchvision checks their md5 digest before they are unpacked.

    Raises:
        InputError: If files are missing, damaged or cannot be downloaded.
    """
    place = root / _PLACES[name][split]
    try:
        _check_regular(root, place)
        return _read(name, root, split, download)
    except _FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        elsewhere = f"pass root= (--root) the folder that has {_PLACES[name][split]}"
        if place.exists():
            raise InputError(
                f"{name} ({split}) in {place} is damaged or incomplete ({reason}). Delete it and pass download=True "
                f"(--download) to fetch it again, or {elsewhere}."
            ) from error
        if download:
            raise InputError(
                f"{name} ({split}) could not be downloaded into {root} ({reason}). Fetch and unpack it by other means "
                f"(docs/data.md has the addresses), or {elsewhere}."
            ) from error
        raise InputError(
            f"{name} ({split}) is not there: {place} is missing. "
            f"Pass download=True (--download) to fetch it, or {elsewhere}."
        ) from error


def _check_regular(root: Path, place: Path) -> None:
    """Refuse FIFOs and devices among the files that torchvision opens: it would wait for them.

    Raises:
        OSError: Naming the file.
    """
    for path in (place, *place.glob("*"), root / "gtsrb" / "GT-final_test.csv"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(f"{path} is no regular file")


def _read(name: str, root: Path, split: Literal["train", "test"], download: bool) -> tuple[Pictures, Tensor, list[str]]:
    from torchvision import datasets

    if name == "cifar10":
        # Its files are pickles, which can run code. The constructor opens each one only after it has compared
        # it with its published digest: never read them in any other way.
        cifar10 = datasets.CIFAR10(root, train=split == "train", download=download)
        return ArrayImages(cifar10.data.transpose(0, 3, 1, 2)), torch.tensor(cifar10.targets), list(cifar10.classes)
    if name == "stl10":
        stl10 = datasets.STL10(root, split, download=download)
        # stl10.classes comes from a file that torchvision neither requires nor checks.
        return ArrayImages(stl10.data), torch.tensor(stl10.labels, dtype=torch.int64), list(_STL10)
    if name == "svhn":
        svhn = datasets.SVHN(root, split, download=download)
        return ArrayImages(svhn.data), torch.tensor(svhn.labels), [str(digit) for digit in range(10)]
    gtsrb = datasets.GTSRB(root, split, download=download)
    # Private, but the one place where torchvision has labels without opening images. The alternative is to write its
    # reader again; a torchvision that renames it raises AttributeError here and fails our tests.
    paths = tuple(Path(path) for path, _ in gtsrb._samples)
    labels = torch.tensor([label for _, label in gtsrb._samples])
    # torchvision takes any folder for complete, and numbers the classes it finds: one too few would shift the labels.
    if len(paths) != GTSRB_IMAGES[split]:
        raise ValueError(f"it has {len(paths):,} images instead of {GTSRB_IMAGES[split]:,}")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
    return ImageFiles(paths), check_labels(labels, count=len(paths), num_classes=len(_SIGNS)), list(_SIGNS)

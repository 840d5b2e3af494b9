"""Folders of image files, one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .images import ImageFiles, check_names

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def split_folders(path: Path) -> tuple[Path, Path] | None:
    """Return the sub-folders `train` and `test`, or None where the folder has neither.

    Raises:
        InputError: If the folder is missing, has one of the two alone, or their classes differ.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "is missing"
        raise InputError(f"{path} {what}; expected a folder with one sub-folder of images per class.")
    train, test = path / "train", path / "test"
    if not train.is_dir() and not test.is_dir():
        return None
    for part in (train, test):
        if not part.is_dir():
            raise InputError(
                f"{part} is missing: {path} needs both train and test, each with one sub-folder per class. "
                "Add it, or move the classes up one level to have them split at random."
            )
    here, there = set(_class_names(train)), set(_class_names(test))
    if here != there:
        alone = [f"{name} only in train" for name in sorted(here - there)]
        alone += [f"{name} only in test" for name in sorted(there - here)]
        raise InputError(
            f"{train} and {test} must have the same classes, or their labels mean different things; found "
            f"{_some(alone)}. Rename or remove those folders."
        )
    return train, test


def read_folder(path: Path) -> tuple[ImageFiles, Tensor, list[str]]:
    """Find the images below `path/<class>/`, classes and files in order of name; nothing is opened.

    Raises:
        InputError: If there is no class, a class has no image, a link leads nowhere, or one class lies inside another.
    """
    classes = _class_names(path)
    if not classes:
        raise InputError(f"{path} has no sub-folders; expected one per class, with images in it.")
    files = {name: image_files(path / name) for name in classes}
    empty = [name for name in classes if not files[name]]
    if empty:
        raise InputError(
            f"{path} has classes without images: {_some(empty)}. "
            f"Add images ({' '.join(SUFFIXES)}) or remove the folders."
        )
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    return ImageFiles(tuple(file for name in classes for file in files[name])), torch.tensor(labels), classes


def image_files(path: Path) -> list[Path]:
    """Return the image files anywhere below a folder, in order of name.

    Raises:
        InputError: If one is a symbolic link that leads nowhere.
    """
    found = _sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [file for file in found if file.is_file()]


def check_classes(path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
    """Refuse a folder whose classes are not exactly those of the data set that it should hold.

    Raises:
        InputError: If classes are missing or unknown; the message names them.
    """
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    if missing or extra:
        found = [f"missing {_some(missing)}"] * bool(missing) + [f"unknown {_some(extra)}"] * bool(extra)
        raise InputError(
            f"{path} must have the {len(wanted)} classes {', '.join(wanted)}; {' and '.join(found)}. "
            "Add or rename the folders, or read them as they are with 'folder:PATH'."
        )


def _class_names(path: Path) -> list[str]:
    # Hidden folders (.ipynb_checkpoints, .git) belong to tools.
    try:
        entries = _sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    folders = [entry for entry in entries if entry.is_dir()]
    _check_apart(folders)
    return check_names(path, [folder.name for folder in folders])


def _sorted(paths: Iterable[Path]) -> list[Path]:
    """Return paths in order of name, none of them a link that leads nowhere: left out, it would shrink the data set.

    Raises:
        InputError: Naming the link.
    """
    ordered = sorted(paths)
    for path in ordered:
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a symbolic link to {path.readlink()}, which is not there. Mend or delete it.")
    return ordered


def _check_apart(folders: list[Path]) -> None:
    """Refuse classes that share images, which only symbolic links can make.

    Raises:
        InputError: Naming the two folders.
    """
    if not any(folder.is_symlink() for folder in folders):
        return
    owners: dict[Path, Path] = {}
    for folder in folders:
        other = owners.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise InputError(f"{folder} is the same folder as {other}, so its images have two labels. Remove one.")
    for place, folder in owners.items():
        around = next((owners[parent] for parent in place.parents if parent in owners), None)
        if around is not None:
            raise InputError(f"{folder} lies inside {around}, so its images have two labels. Remove one.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"

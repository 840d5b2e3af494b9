"""Training state on disk: one file per epoch, written whole or not at all."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, InputError
from ..files import write_bytes

_KEEP = 2


def checkpoint_folder(folder: str | Path | None, *, resume: bool) -> Path | None:
    """Return the folder of a run, created and writable, or None where nothing is to be kept.

    Args:
        folder: The folder; None keeps nothing.
        resume: Whether a run in that folder is to be gone on with.

    Raises:
        ConfigError: If `resume` is set without a folder.
        InputError: If the folder cannot be written.
        CheckpointError: If the folder holds an earlier run and `resume` was not asked for.
    """
    if folder is None:
        if resume:
            raise ConfigError("resume=True needs the checkpoint_dir to resume from.")
        return None
    prepare_folder(Path(folder), resume=resume)
    return Path(folder)


def prepare_folder(folder: Path, *, resume: bool) -> None:
    """Create the folder and prove it writable before training starts.

    Raises:
        InputError: If the folder cannot be written.
        CheckpointError: If the folder holds an earlier run and `resume` was not asked for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(
            f"checkpoint_dir {folder} cannot be written: {error.strerror}. Choose a writable folder."
        ) from error
    if not resume and any(folder.rglob("epoch-*.pt")):
        raise CheckpointError(
            f"checkpoint_dir {folder} holds checkpoints of an earlier run. Pass resume=True to go on from them, or "
            "choose another folder."
        )


def save_epoch(folder: Path, epoch: int, state: dict[str, Any]) -> Path:
    """Write the state after an epoch atomically, and delete all epochs but the newest two.

    A process killed at any moment leaves either the complete new file or none.

    Raises:
        CheckpointError: If the folder cannot be written. The epochs before are as they were.
    """
    path = folder / f"epoch-{epoch:04d}.pt"
    content = io.BytesIO()
    torch.save(state, content)  # not to the file, since PyTorch may end the process where a write fails
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".epoch-*.pt"):  # by a process that was killed while it wrote
            left.unlink()
        write_bytes(path, content.getbuffer())
        for old in _epochs(folder)[:-_KEEP]:
            old.unlink()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}. Free some space and resume.") from error
    return path


def load_latest(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Read the newest complete epoch, or return None if there is none. Only tensors and plain values are unpickled.

    Args:
        folder: Folder that `save_epoch` wrote to.
        fingerprint: Settings that the saved run must agree on, such as rates, data size and classes.

    Raises:
        CheckpointError: If the file is damaged or belongs to a run with other settings.
    """
    paths = _epochs(folder)
    if not paths:
        return None
    path = paths[-1]
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Delete it to go on from the epoch before.") from error
    theirs = state["fingerprint"]
    differing = sorted(key for key in fingerprint.keys() | theirs.keys() if fingerprint.get(key) != theirs.get(key))
    if differing:
        details = "; ".join(f"{key} was {theirs.get(key)!r}, now {fingerprint.get(key)!r}" for key in differing)
        raise CheckpointError(
            f"{path} belongs to another run: {details}. "
            "Resume with the same settings and data, or choose another folder."
        )
    return state


def newest(folder: Path | None) -> Path | None:
    """Return the path of the newest complete epoch, if any."""
    paths = _epochs(folder) if folder else []
    return paths[-1] if paths else None


def _epochs(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.pt"))

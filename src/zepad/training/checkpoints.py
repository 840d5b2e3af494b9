"""Training state on disk: one file per epoch, written whole or not at all, and read only as it was written.

A file is what `torch.save` makes of the state, followed by the SHA-256 of all that, which `torch.load` passes over.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor

from ..encoders.checkpoints import check_archive
from ..errors import CheckpointError, ConfigError, InputError
from ..files import make_writable, open_regular, write_bytes, writing
from ..schema import describe

_KEEP = 2
_DIGEST = 32  # bytes at the end of a file
_MAX_BYTES = 2**38
_CHECKED: Any = {"extra": "forbid", "arbitrary_types_allowed": True}


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
    with writing(f"checkpoint_dir {folder}", InputError):
        make_writable(folder)
    if not resume and any(folder.rglob("epoch-*.pt")):
        raise CheckpointError(
            f"checkpoint_dir {folder} holds checkpoints of an earlier run. Pass resume=True to go on from them, or "
            "choose another folder."
        )


def save_epoch(folder: Path, epoch: int, state: dict[str, Any]) -> Path:
    """Write the state after an epoch atomically, and delete all epochs but the newest two.

    A process killed at any moment leaves either the complete new file or none.

    Raises:
        CheckpointError: If the file cannot be written, as on a full disk. Earlier epochs stay.
    """
    path = folder / _name(epoch)
    content = io.BytesIO()
    torch.save(state, content)  # not to the file, since PyTorch may end the process where a write fails
    content.write(_digest(content, content.tell()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".epoch-*.pt"):  # by a process that was killed while it wrote
            left.unlink()
        write_bytes(path, content.getbuffer())
        for old in _epochs(folder)[:-_KEEP]:
            old.unlink()
    except OSError as error:
        last = newest(folder)
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. "
            f"{f'The last good checkpoint is {last}' if last else 'No checkpoint was kept'}. Make room, and go on with "
            "resume=True."
        ) from error
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
        state = _read(path)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}. Delete it to go on from the epoch "
            "before."
        ) from error
    theirs = state["fingerprint"]
    differing = sorted(key for key in fingerprint.keys() | theirs.keys() if fingerprint.get(key) != theirs.get(key))
    if differing:
        details = "; ".join(f"{key} was {theirs.get(key)!r}, now {fingerprint.get(key)!r}" for key in differing)
        raise CheckpointError(
            f"{path} belongs to another run: {details}. "
            "Resume with the same settings and data, or choose another folder."
        )
    return state


def _read(path: Path) -> dict[str, Any]:
    """Return the state in a file whose digest is right, and which holds what `TrainingState.save` writes.

    Raises:
        CheckpointError: With what is wrong with "it", the file.
        OSError: If it cannot be opened.
    """
    with open_regular(path, limit=_MAX_BYTES) as file:
        size = file.seek(0, 2) - _DIGEST
        if size < 0 or _digest(file, size) != file.read():
            raise CheckpointError(
                "its content is not what was written: it is damaged, or of a version of zepad that wrote no digest"
            )
        check_archive(file)
        file.seek(0)
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile pickle can raise anything; not chained, as torch advises to trust it
            raise CheckpointError(f"it holds more than tensors and plain values ({type(error).__name__})") from None
    try:
        saved = _SAVED.validate_python(state)
    except ValidationError as error:
        raise CheckpointError(f"it holds no training state: {describe(error)}") from error
    if path.name != _name(saved.epoch) or len(saved.history) != saved.epoch + 1:
        raise CheckpointError(f"it is of epoch {saved.epoch} with {len(saved.history)} records, not of its name")
    for weights in (saved.weights, {} if saved.best is None else saved.best.weights):
        if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
            raise CheckpointError(f"its weights are not finite: {', '.join(broken[:3])}")
    return state


@dataclass(frozen=True, kw_only=True)
class _Best:
    __pydantic_config__ = _CHECKED
    epoch: NonNegativeInt
    score: float
    weights: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Saved:
    __pydantic_config__ = _CHECKED
    fingerprint: dict[str, Any]
    epoch: NonNegativeInt
    batches: PositiveInt | None
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    history: list[dict[str, float]]
    best: _Best | None


_SAVED = TypeAdapter(_Saved)


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes of a file, which is left behind them."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(min(size - file.tell(), 2**20)):
        digest.update(chunk)
    return digest.digest()


def newest(folder: Path | None) -> Path | None:
    """Return the path of the newest complete epoch, if any."""
    paths = _epochs(folder) if folder else []
    return paths[-1] if paths else None


def _name(epoch: int) -> str:
    return f"epoch-{epoch:04d}.pt"


def _epochs(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.pt"), key=lambda path: (len(path.name), path.name))  # 10000 after 9999

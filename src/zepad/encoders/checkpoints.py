"""Other projects' checkpoints: reading their tensors without running anything, and naming what is no checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular

# Lightning keeps objects of the training run beside the weights: settings, callbacks, schedulers. `weights_only=True`
# refuses them, so objects whose full name starts with one of these prefixes are read into stand-ins that do nothing.
# Any other name in a file is refused.
_RECORDS = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.getattr",  # with partial, in the schedulers of solo-learn's SimSiam
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "functools.partial",
    "lightly.",
    "lightning.",
    "lightning_fabric.",
    "numpy._core.multiarray.",
    "numpy.core.multiarray.",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.",
    "pathlib.",
    "pl_bolts.",
    "pytorch_lightning.",
    "solo.",
    "torch.optim.",
    "typing.",
)
_MAPPINGS = ("AttributeDict", "defaultdict")  # filled item by item, which torch allows for a true dict alone

_MAX_BYTES = 2**34
_MAX_PICKLE = 2**23  # names and records, tensors lie beside; one byte of it can ask for two hundred of memory
_HEAD = 512  # number of leading bytes from which the kind of a file is recognised
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first until torch 1.6
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state dict of a checkpoint, on the CPU.

    A Lightning checkpoint, a bare state dict saved by `torch.save` and a safetensors file are all read. The prefix
    `module.` of a model wrapped in DataParallel is removed once if every key has it. Nothing in the file is executed:
    `torch.load` is always called with `weights_only=True`, and memory is taken only for what lies in the file. The
    checksums in a file of the zip format, which torch has written since 1.6, are compared; the other formats have none.

    Args:
        path: Path of the checkpoint file.

    Returns:
        The state dict. Its values are tensors, except for the extra state that some modules keep.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, or names an object that is neither a tensor
            nor a known record of training.
    """
    path = Path(path)
    content = _read(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        found = f"the entries {listed(map(_name, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"{path} holds {found}; expected tensors by name, or a state_dict of them.")
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} holds the entries {listed(map(_name, state))}; expected strings for names.")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join the first `limit` names and say how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def check_archive(file: BinaryIO) -> None:
    """Refuse a zip archive that `torch.save` did not write so, or that is not what it was when it was written.

    `torch.load` compares no checksum, unpacks compressed entries of any size, and reads a pickle of any size.

    Args:
        file: The file at any position; it is left at another.

    Raises:
        CheckpointError: With what is wrong with "it", the file; without what to do.
    """
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, size=file.seek(0, 2))
            if damaged := archive.testzip():
                raise CheckpointError(f"it is damaged: the checksum of {damaged} does not fit its content")
    except CheckpointError:
        raise
    except BadZipFile as error:
        raise CheckpointError(f"it is damaged or cut short: {error}") from error
    except Exception as error:  # a damaged table of contents can raise anything
        raise CheckpointError("it is damaged: its table of contents makes no sense") from error


def _check_entries(entries: list[ZipInfo], *, size: int) -> None:
    names = [entry.filename for entry in entries]
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError("it is a zip archive that torch.save did not write")
    if len(set(names)) < len(names) or min(entry.header_offset for entry in entries):
        raise CheckpointError("it is an archive of which two readers can see different content")
    if any(entry.compress_type != ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise CheckpointError("it is compressed, which torch.save never does: a small file could fill the memory")
    if any(entry.filename.endswith("/data.pkl") and entry.file_size > _MAX_PICKLE for entry in entries):
        raise CheckpointError(f"its pickle is larger than {_MAX_PICKLE} bytes, which no names and settings are")


def _name(key: object) -> str:
    return key if isinstance(key, str) else f"a {type(key).__name__}"  # not its text, which may be without end


def _read(path: Path) -> object:
    try:
        with open_regular(path, limit=_MAX_BYTES) as file:
            head = file.read(_HEAD)
            foreign = _foreign(head)
            if head.startswith(b"PK"):
                check_archive(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Unpack it, or download or copy it again.") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}. Check the path.") from error
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder. Name the checkpoint file in it.") from error
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}. Name a checkpoint file.") from error
    if foreign:
        raise CheckpointError(f"{path} is {foreign}")
    try:
        if head[8:9] == b"{":  # after the length of a safetensors header
            return load_file(path)
        return _unpickle(path, zipped=head.startswith(b"PK"))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        # Not chained: torch's own text advises to turn the protection off.
        raise CheckpointError(
            f"{path} is damaged, cut short or no checkpoint ({type(error).__name__}: {_reason(error)}). "
            "Download or copy it again."
        ) from None


def _foreign(head: bytes) -> str:
    """Describe a file that is no checkpoint and what to do about it; return "" for one that may be a checkpoint."""
    if not head:
        return "empty. Download or copy it again."
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file. Fetch the file itself with: git lfs pull."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, such as a login or error page saved as the file. Download the checkpoint again."
    if head.startswith(_PACKED) or head[257:262] == b"ustar":
        return "a packed archive. Unpack it and name the checkpoint in it."
    if head[8:9] != b"{" and not head.startswith((b"PK", _LEGACY)):
        return "damaged, cut short or no checkpoint: it does not begin as torch.save and safetensors do."
    return ""


def _unpickle(path: Path, *, zipped: bool) -> object:
    if not zipped:  # the older format, which does not list the names it needs, must hold tensors alone
        with _Legacy(path.open("rb", buffering=0)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused = sorted(name for name in names if not name.startswith(_RECORDS))
    if refused:
        raise CheckpointError(
            f"{path} asks for {listed(refused)} to be run or built, which a checkpoint needs for nothing; it was not "
            "opened. If you trust its author, have its state_dict alone saved where it was made."
        )
    with torch.serialization.safe_globals([_stand_in(name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Legacy(io.BufferedReader):
    """A file of the older format, of which little is read but the tensors, and those past this class."""

    _left = _MAX_PICKLE

    def read(self, size: int | None = -1, /) -> bytes:
        """Return bytes of a pickle.

        Raises:
            CheckpointError: If that makes more of them than names and records need.
        """
        self._left -= self._left + 1 if size is None or size < 0 else size
        if self._left < 0:
            raise CheckpointError(f"its pickle is larger than {_MAX_PICKLE} bytes, which no names and settings are")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:  # noqa: ARG002 - no name of a class is longer
        """Return a line, of which there is one per name."""
        return super().readline(_HEAD)


class _Inert:
    """Stand-in that accepts any arguments and state, keeps nothing and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _InertMapping:
    def __new__(cls, *_: object) -> Any:
        return {}


def _stand_in(name: str) -> type:
    """Return a class that torch takes for the one of this full name."""
    module, _, own = name.rpartition(".")
    return type(own, (_InertMapping if own in _MAPPINGS else _Inert,), {"__module__": module})


def _reason(error: Exception) -> str:
    """Return the one informative sentence of an error that torch raised."""
    sentence = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
    return next(iter(sentence.splitlines()), "")

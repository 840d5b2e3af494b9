"""Other projects' checkpoints: reading their tensors without running anything, and naming what is no checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

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

_HEAD = 512  # number of leading bytes from which the kind of a file is recognised
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state dict of a checkpoint, on the CPU.

    A Lightning checkpoint, a bare state dict saved by `torch.save` and a safetensors file are all read. The prefix
    `module.` of a model wrapped in DataParallel is removed once if every key has it. Nothing in the file is executed:
    `torch.load` is always called with `weights_only=True`.

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
        found = f"the entries {listed(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"{path} holds {found}; expected tensors by name, or a state_dict of them.")
    state = {str(key): value for key, value in state.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join the first `limit` names and say how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        foreign = _foreign(path, head)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}. Check the path.") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder. Name the checkpoint file in it.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if foreign:
        raise CheckpointError(f"{path} is {foreign}")
    try:
        if head[8:9] == b"{":  # after the length of a safetensors header
            return load_file(path)
        return _unpickle(path, zipped=head.startswith(b"PK"))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        # Not chained: torch's own text advises to turn the protection off.
        raise CheckpointError(
            f"{path} is damaged, cut short or no checkpoint ({type(error).__name__}: {_reason(error)}). "
            "Download or copy it again."
        ) from None


def _foreign(path: Path, head: bytes) -> str:
    """Describe a file that is no checkpoint and what to do about it; return "" for one that may be a checkpoint."""
    if not head:
        return "empty. Download or copy it again."
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file. Fetch the file itself with: git lfs pull."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, such as a login or error page saved as the file. Download the checkpoint again."
    if head.startswith(_PACKED) or head[257:262] == b"ustar":
        return "a packed archive. Unpack it and name the checkpoint in it."
    if head.startswith(b"PK"):
        try:
            with ZipFile(path) as archive:
                names = archive.namelist()
        except BadZipFile:
            return "cut short: its end, with the table of contents, is missing. Download or copy it again."
        except Exception:  # a damaged table of contents can raise anything
            return "damaged: its table of contents makes no sense. Download or copy it again."
        if not any(name.endswith("/data.pkl") for name in names):
            return "a zip archive that torch.save did not write. Unpack it and name the checkpoint in it."
    return ""


def _unpickle(path: Path, *, zipped: bool) -> object:
    # Only the zip format, the default since torch 1.6, lists the names it needs. Older files must hold tensors alone.
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    refused = sorted(name for name in names if not name.startswith(_RECORDS))
    if refused:
        raise CheckpointError(
            f"{path} asks for {listed(refused)} to be run or built, which a checkpoint needs for nothing; it was not "
            "opened. If you trust its author, have its state_dict alone saved where it was made."
        )
    with torch.serialization.safe_globals([_stand_in(name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


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

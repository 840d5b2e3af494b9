"""Weight files: their digests, reading them, and giving a module exactly the tensors that they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_opened
from ..finite import faulty_weight
from .config import SavedFile


def check_weights(file: BinaryIO, record: SavedFile) -> bytes:
    """Return the content of a weight file whose size and digest are those that the config states.

    Args:
        file: The file, read from its beginning.
        record: Digest and size that it must have.

    Raises:
        CheckpointError: If the file cannot be read, or is of another size or content.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:  # checked first, so that an arbitrarily large file is not read
            kind = "truncated" if size < record.bytes else "not the file that was saved"
            raise CheckpointError(
                f"{file.name} has {size} bytes, expected {record.bytes}: it is {kind}. Save or download it again."
            )
        blob = read_opened(file, limit=record.bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be read: {error.strerror}. Save or download the model again."
        ) from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(
            f"{file.name} has sha256 {digest}, expected {record.sha256}: its content was changed. "
            "Save or download it again."
        )
    return blob


def read_weights(file: BinaryIO, record: SavedFile) -> dict[str, Tensor]:
    """Return the tensors of a weight file whose size and digest are those that the config states.

    Args:
        file: The file, read from its beginning.
        record: Digest and size that it must have.

    Raises:
        CheckpointError: If the file cannot be read, is of another size or content, or is no safetensors file.
    """
    blob = check_weights(file, record)
    try:
        return load(blob)
    # safetensors raises KeyError for dtypes that torch lacks, and the other errors for damaged files.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AssertionError, OverflowError) as error:
        raise CheckpointError(f"{file.name} is no safetensors file: {error}.") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Give a module exactly these tensors: every key and shape must match.

    Raises:
        CheckpointError: Listing missing and unexpected keys and differing shapes; or if a weight is not finite or a
            running variance is negative.
    """
    own = module.state_dict(keep_vars=True)
    check_fit(own, tensors, type(module).__name__, origin)
    # assign=True keeps the stored dtype, so that predictions are bit-identical.
    module.load_state_dict(_tied_alike(own, tensors, origin), strict=True, assign=True)
    fault = faulty_weight(module)
    if fault:
        raise CheckpointError(f"{origin}: {fault}. No decision could be trusted. Get the file from its author again.")


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Refuse tensors that are not exactly the state of a module, in keys, shapes and kind of number.

    Args:
        own: State of the module, possibly on the meta device.
        tensors: Tensors that were read from a file.
        name: Name of the module, for the message.
        origin: File that holds the tensors, for error messages.

    Raises:
        CheckpointError: Listing missing and unexpected keys and differing shapes.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape
    ]
    types = [
        f"{key} is {tensors[key].dtype}, expected {own[key].dtype}"
        for key in sorted(own.keys() & tensors.keys())
        if _number_kind(own[key]) != _number_kind(tensors[key])
    ]
    if missing or unexpected or shapes or types:
        problems = [
            f"{label}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for label, keys in (
                ("missing keys", missing),
                ("unexpected keys", unexpected),
                ("shapes", shapes),
                ("types", types),
            )
            if keys
        ]
        raise CheckpointError(
            f"{origin} does not fit {name}: {'; '.join(problems)}. Pass the module it was saved from."
        )


def _number_kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    eight_bits = tensor.is_floating_point() and tensor.dtype.itemsize == 1  # which torch stores and cannot compute with
    return tensor.is_floating_point(), tensor.is_complex(), eight_bits


def _tied_alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Give keys that share a parameter in the module one parameter here, so that the tie outlives assignment."""
    parameters: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        slot = own[key]
        if not isinstance(slot, nn.Parameter):
            state[key] = tensor
            continue
        tied = parameters.get(id(slot))
        if tied is not None and not torch.equal(tied, tensor):
            raise CheckpointError(f"{origin}: {key} is one with another parameter, yet their values differ.")
        state[key] = tied if tied is not None else nn.Parameter(tensor, requires_grad=slot.requires_grad)
        parameters[id(slot)] = state[key]
    return state


def tensors_of(owner: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state of a module on the CPU, as a weight file can hold it.

    Args:
        owner: Name of the module, for the message.
        module: The module.

    Raises:
        CheckpointError: If some of the state is no tensor, a weight is not finite, or a running variance is negative.
    """
    state = module.state_dict()
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(
            f"{owner} has state that is no tensor ({', '.join(foreign)}), which a weight file cannot hold. "
            "Drop it from the module's state_dict."
        )
    fault = faulty_weight(module)
    if fault:
        raise CheckpointError(
            f"{owner}: {fault}, so the model cannot decide and is not saved. Train it again, or load an earlier save."
        )
    # Tensors are cloned, because safetensors refuses tensors that share memory.
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def cast(module: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Convert the floating-point weights and buffers of a module, in place.

    Args:
        module: The module.
        dtype: Floating-point type.
        name: Name of the module, for the message.

    Raises:
        CheckpointError: If a value is too large for the type. The module is left as it was.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.equal(tensor.to(dtype).isfinite(), tensor.isfinite()):
            raise CheckpointError(
                f"{name}: {key} holds values beyond the range of {dtype}, such as {tensor.abs().max():.3g}. Load it in "
                "torch.bfloat16, which has the range of float32."
            )
    module.to(dtype)

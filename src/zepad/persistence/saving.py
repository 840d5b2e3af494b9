"""Writing a model into a folder, in the place of an older one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from ..errors import CheckpointError, StageError
from .card import CardDetails, model_card
from .config import (
    CARD_FILE,
    CONFIG_FILE,
    DETECTOR_FILE,
    ENCODER_FILES,
    HEADS_FILE,
    SavedConfig,
    SavedFile,
    encoder_file,
    parse_config,
)
from .contents import Home, SavedModel
from .folder import replacing_model
from .weights import tensors_of


def save_model(
    folder: Path,
    model: SavedModel,
    *,
    heads_only: bool = False,
    card: CardDetails = CardDetails(),
    model_id: str | None = None,
) -> SavedConfig:
    """Write weight files, config.json and model card, in the place of an older save, as `replacing_model` does.

    Args:
        folder: Folder to write, created if need be. Weight files of an earlier save that this one has not are removed.
        model: Result of `describe_model`.
        heads_only: Leave the encoders' files out and name the repository and commit that hold them.
        card: Facts for the model card that only the publisher knows.
        model_id: Hub id for the card, where known.

    Returns:
        The config as it was written, files included.

    Raises:
        StageError: If `heads_only` and there are no heads, or the encoders are not on the Hub.
        CheckpointError: If the folder cannot be written, something in the model cannot be stored, or `heads_only` and
            the encoders are no longer those that are published.
    """
    home = _home_of_heads(model) if heads_only else None
    config = replace(model.config, base=home.base if home else None)
    text = model_card(config, model_id=model_id, details=card)  # may raise, so it comes before any writing
    blobs = _blobs(model)
    config = replace(config, files={name: _record(blob) for name, blob in blobs.items()})
    if home is not None:
        _check_unchanged(config, home)
    spelled_out = _spelled_out(config)
    with replacing_model(folder) as new:
        for name in config.own_files:
            (new / name).write_bytes(blobs[name])
        (new / CARD_FILE).write_text(text, encoding="utf-8")
        (new / CONFIG_FILE).write_text(spelled_out, encoding="utf-8")
    return config


def _home_of_heads(model: SavedModel) -> Home:
    if not model.heads:
        call = "harden" if model.config.stage == "built" else "fit_benign"
        raise StageError(f"there are no heads to save alone. Call {call}(loader) first.")
    if model.home is None:
        raise StageError(
            "the encoders of this model are not on the Hub, so heads alone could not be loaded. "
            'Publish the whole model first: push_to_hub("user/name").'
        )
    return model.home


def _blobs(model: SavedModel) -> dict[str, bytes]:
    """Return the content of every weight file that the model has, by name."""
    files = {encoder_file(role): tensors_of(role, encoder.backbone) for role, encoder in model.encoders.items()}
    heads = {role: tensors_of(role, head) for role, head in model.heads.items()}
    files[HEADS_FILE] = {f"{role}.{key}": tensor for role, own in heads.items() for key, tensor in own.items()}
    files[DETECTOR_FILE] = tensors_of("detector", model.detector)
    return {name: save(tensors) for name, tensors in files.items() if tensors or name in ENCODER_FILES}


def _record(blob: bytes) -> SavedFile:
    return SavedFile(sha256=hashlib.sha256(blob).hexdigest(), bytes=len(blob))


def _check_unchanged(config: SavedConfig, home: Home) -> None:
    changed = [name for name, file in config.files.items() if name in ENCODER_FILES and file != home.files.get(name)]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed since the encoders were published as {home.base.repo_id}, so heads alone "
            "would not fit them. Save or push the whole model: heads_only=False."
        )


def _spelled_out(config: SavedConfig) -> str:
    """Return the config as JSON that can be read back."""
    try:
        text = json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"
        parse_config(text, CONFIG_FILE)
    except (TypeError, ValueError, RecursionError, CheckpointError) as error:
        reason = str(error).removesuffix(" Save or download it again.").rstrip(".")
        raise CheckpointError(
            f"config.json cannot hold this model: {reason}. Keep threshold finite and provenance plain JSON."
        ) from error
    return text

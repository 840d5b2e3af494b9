"""A saved model's folder to the Hub and back, without building the model: no module of the caller's is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import CheckpointError, HubError
from .card import model_card
from .config import CONFIG_FILE, ENCODER_FILES, WEIGHT_FILES, SavedConfig, check_weights, read_config
from .hub import HubRepo, Published, publish
from .loading import SavedFiles

CARD_FILE = "README.md"


def check_folder(folder: Path) -> SavedConfig:
    """Return the config of a saved model whose weight files are those it vouches for.

    Raises:
        CheckpointError: If anything is missing or damaged.
    """
    config = read_config(folder / CONFIG_FILE)
    for name in _own_files(config):
        check_weights(folder / name, config.files[name])
    return config


def write_card(folder: Path, card: str) -> Path:
    """Write what `model_card` says beside a saved model.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    path = folder / CARD_FILE
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return path


def publish_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
) -> Published:
    """Publish a saved model as it is, in one commit or not at all.

    Args:
        folder: Checked before anything is sent; files that are not the model's stay here.
        repo_id: As in `ZePAD.push_to_hub`, like all that follows.
        private: Visibility.
        revision: Branch.
        token: Of the Hub.
        commit_message: Its first line.

    Raises:
        CheckpointError: If the folder holds no whole model.
        HubError: Saying whether anything was published.
    """
    own = _own_files(check_folder(folder))
    card = [CARD_FILE] if (folder / CARD_FILE).is_file() else []
    return publish(
        folder,
        repo_id,
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message,
        files=[CONFIG_FILE, *card, *own],
        obsolete=[name for name in WEIGHT_FILES if name not in own],
    )


def download(repo: HubRepo, folder: Path) -> SavedConfig:
    """Copy a published model into a folder, whole: heads that name a base bring its encoders along.

    Args:
        repo: Where the model is.
        folder: Created if need be; config.json comes last, so that an interrupted copy never passes for a whole one.

    Raises:
        CheckpointError: If what came is damaged, or the folder cannot be written.
        HubError: If the Hub cannot deliver.
    """
    # Never a folder that is called like the id: that may be the one to be written.
    files = SavedFiles(repo.fetch(CONFIG_FILE), repo, repo)
    paths = {name: files.verified(name) for name in files.config.files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for stale in set(WEIGHT_FILES) - set(paths):
            (folder / stale).unlink(missing_ok=True)
        for name, path in paths.items():
            shutil.copyfile(path, folder / name)
        _copy_card(files, folder, repo.repo_id)
        shutil.copyfile(files.path(CONFIG_FILE), folder / CONFIG_FILE)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return files.config


def _copy_card(files: SavedFiles, folder: Path, model_id: str) -> None:
    """The publisher's card, with the license and all that only they know; a new one where there is none."""
    try:
        card = files.path(CARD_FILE)
    except HubError:
        write_card(folder, model_card(files.config, model_id=model_id))
    else:
        shutil.copyfile(card, folder / CARD_FILE)


def _own_files(config: SavedConfig) -> list[str]:
    """The weight files that lie beside the config."""
    return [name for name in config.files if config.base is None or name not in ENCODER_FILES]

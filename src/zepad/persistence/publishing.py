"""Saved models on their way to the Hub and back.

A folder is published and downloaded without building the model, so that no module of the caller's is needed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import CheckpointError, HubError
from .card import CARD_FILE, CardDetails, model_card, write_card
from .commits import Published, publish
from .config import CONFIG_FILE, WEIGHT_FILES, Base, SavedConfig, read_config
from .contents import Home, SavedModel
from .hub import HubRepo
from .loading import SavedFiles
from .saving import save_model
from .weights import check_weights


def check_folder(folder: Path) -> SavedConfig:
    """Return the config of a saved model after checking size and digest of its weight files.

    Raises:
        CheckpointError: If anything is missing or damaged.
    """
    config = read_config(folder / CONFIG_FILE)
    for name in config.own_files:
        check_weights(folder / name, config.files[name])
    return config


def push_model(
    repo_id: str,
    model: SavedModel,
    *,
    heads_only: bool,
    card: CardDetails,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
) -> tuple[Published, Home | None]:
    """Publish a model in one commit or not at all.

    Args:
        repo_id: Id of the repository, `"user/name"`, created if need be.
        model: Result of `describe_model`.
        heads_only: Publish the heads alone, with the repository and commit that hold the encoders.
        card: Facts for the model card that only the publisher knows.
        private: Visibility of a new repository. True refuses an existing public one.
        revision: Branch to commit to, created if need be; None is the default branch.
        token: Access token, True or None for the stored one, False for none.
        commit_message: First line of the commit's message.

    Returns:
        What the Hub now holds, and where the encoders are published from now on.

    Raises:
        StageError: If `heads_only` and there are no heads, or the encoders are not on the Hub.
        CheckpointError: If something in the model cannot be stored.
        HubError: If nothing was published, or it cannot be told; it says which.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = save_model(folder, model, heads_only=heads_only, card=card, model_id=repo_id)
        published = publish_folder(
            folder, repo_id, private=private, revision=revision, token=token, commit_message=commit_message
        )
    if heads_only:
        return published, model.home
    base = Base(repo_id=published.repo_id, revision=published.revision)
    return published, Home(base=base, files=config.files)


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
        folder: Folder of the model. It is checked before anything is sent, and files that are not the model's stay.
        repo_id: Id of the repository, `"user/name"`, created if need be.
        private: Visibility of a new repository. True refuses an existing public one.
        revision: Branch to commit to, created if need be; None is the default branch.
        token: Access token, True or None for the stored one, False for none.
        commit_message: First line of the commit's message.

    Raises:
        CheckpointError: If the folder holds no whole model.
        HubError: If nothing was published, or it cannot be told; it says which.
    """
    own = check_folder(folder).own_files
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
        repo: Repository of the model.
        folder: Created if need be; config.json comes last, so that an interrupted copy never passes for a whole one.

    Raises:
        CheckpointError: If what came is damaged, or the folder cannot be written.
        HubError: If the Hub cannot deliver.
    """
    # A local folder of the same name as the id is never read, because it may be the target.
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
    """Copy the publisher's card, which holds what only they know, or write a new one where there is none."""
    try:
        card = files.path(CARD_FILE)
    except HubError:
        write_card(folder, model_card(files.config, model_id=model_id))
    else:
        shutil.copyfile(card, folder / CARD_FILE)

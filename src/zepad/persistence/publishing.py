"""Saved models on their way to the Hub and back.

A folder is published and downloaded without building the model, so that no module of the caller's is needed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import CheckpointError, HubError
from .card import CardDetails, model_card
from .commits import Published, publish
from .config import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHT_FILES, Base, SavedConfig
from .contents import Home, SavedModel
from .folder import OpenedFolder, replacing_model
from .hub import HubRepo
from .loading import SavedFiles
from .saving import save_model
from .weights import check_weights

_MAX_CARD_BYTES = 10 * 2**20


def check_folder(folder: Path) -> SavedConfig:
    """Return the config of a saved model after checking size and digest of its weight files.

    Raises:
        CheckpointError: If anything is missing or damaged, or is a symbolic link.
    """
    with OpenedFolder(folder, follow=False) as opened:
        for name in opened.config.own_files:
            check_weights(opened.open(name), opened.config.files[name])
        return opened.config


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
        published = _publish(
            folder, config, repo_id, private=private, revision=revision, token=token, commit_message=commit_message
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
        folder: Folder of the model. A copy of the model's own files is checked and sent, so that a save meanwhile
            changes nothing, and no other file of the folder is published.
        repo_id: Id of the repository, `"user/name"`, created if need be.
        private: Visibility of a new repository. True refuses an existing public one.
        revision: Branch to commit to, created if need be; None is the default branch.
        token: Access token, True or None for the stored one, False for none.
        commit_message: First line of the commit's message.

    Raises:
        CheckpointError: If the folder holds no whole model, or a file of it is a symbolic link.
        HubError: If nothing was published, or it cannot be told; it says which.
    """
    with TemporaryDirectory() as temporary:
        copy = Path(temporary)
        config = _copy_model(folder, copy)
        return _publish(
            copy, config, repo_id, private=private, revision=revision, token=token, commit_message=commit_message
        )


def _copy_model(folder: Path, to: Path) -> SavedConfig:
    """Copy the files of one save, checked, into an empty folder."""
    with OpenedFolder(folder, follow=False) as opened:
        config = opened.config
        try:
            for name in config.own_files:
                (to / name).write_bytes(check_weights(opened.open(name), config.files[name]))
            for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (CARD_FILE, _MAX_CARD_BYTES)):
                if opened.has(name):
                    (to / name).write_bytes(opened.read(name, limit=limit))
        except OSError as error:
            raise CheckpointError(
                f"the model in {folder} cannot be copied to {to}: {error.strerror}. Free some space there."
            ) from error
    return config


def _publish(
    folder: Path,
    config: SavedConfig,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
) -> Published:
    own = config.own_files
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
        folder: Created if need be. A model that it holds is replaced as `replacing_model` does.

    Raises:
        CheckpointError: If what came is damaged, or the folder cannot be written.
        HubError: If the Hub cannot deliver.
    """
    # A local folder of the same name as the id is never read, because it may be the target.
    with SavedFiles(repo.fetch(CONFIG_FILE), repo, repo) as files:
        paths = {name: files.verified(name) for name in files.config.files}
        paths[CONFIG_FILE] = files.fetched(CONFIG_FILE)
        try:
            paths[CARD_FILE] = files.fetched(CARD_FILE)
        except HubError:
            card = model_card(files.config, model_id=repo.repo_id)
        with replacing_model(folder) as new:
            for name, path in paths.items():
                shutil.copyfile(path, new / name)
            if CARD_FILE not in paths:  # the publisher's card holds what only they know
                (new / CARD_FILE).write_text(card, encoding="utf-8")
        return files.config

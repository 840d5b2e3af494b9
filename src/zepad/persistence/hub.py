"""Download of files from one commit of a Hugging Face Hub repository."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import CheckpointError, HubError
from .config import CONFIG_FILE
from .hub_errors import CLIENT_ERRORS, again, describe_repository, explain

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class HubRepo:
    """A repository on the Hub and how to access it.

    Attributes:
        repo_id: Id of the repository, `"user/name"`.
        revision: Branch, tag or commit; None is the default branch.
        token: Access token, True for the stored one, False for none.
        cache_dir: Cache folder of the Hub client; None is its default.
        local_files_only: Whether to use cached files alone.
        force_download: Whether to download files again that are cached.
    """

    repo_id: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def fetch(self, filename: str, *, revision: str | None = None) -> Path:
        """Download one file, or find it in the cache.

        Args:
            filename: Name of the file in the repository.
            revision: Branch, tag or commit; None takes that of the attribute.

        Returns:
            Path of the file in the cache. Its parent folder is named after the resolved commit.

        Raises:
            HubError: If the repository, revision or file cannot be downloaded.
        """
        path = self._download(filename, revision)
        if not _is_intact(path) and self._may_download:
            path = replace(self, force_download=True)._download(filename, revision)
        if not _is_intact(path):
            raise HubError(
                f"{filename} of {self.repo_id!r} is damaged: {path} is not the file that the Hub has. "
                "Load it with force_download=True, online."
            )
        return path

    def read(self, filename: str, parse: Callable[[Path], _T], *, revision: str | None = None) -> _T:
        """Fetch a file and parse it. A file that `parse` reports as damaged is downloaded once more.

        The Hub client checks the size of a download but not its digest, and does not check cached files at all.

        Args:
            filename: Name of the file in the repository.
            parse: Function of the path that raises `CheckpointError` if the file is damaged.
            revision: Branch, tag or commit; None takes that of the attribute.

        Returns:
            The result of `parse`.

        Raises:
            CheckpointError: If the file is damaged on the Hub, or in the cache while the client is offline.
            HubError: If the repository, revision or file cannot be downloaded.
        """
        try:
            return parse(self.fetch(filename, revision=revision))
        except CheckpointError:
            if not self._may_download:
                raise
            return parse(replace(self, force_download=True).fetch(filename, revision=revision))

    @property
    def _may_download(self) -> bool:
        return not (self.local_files_only or constants.HF_HUB_OFFLINE)

    def _download(self, filename: str, revision: str | None) -> Path:
        revision = revision or self.revision
        try:
            path = again(
                lambda: hf_hub_download(
                    self.repo_id,
                    filename,
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                )
            )
        except CLIENT_ERRORS as error:
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            reason = self._contents(revision) if absent else explain(error, self.repo_id, revision)
            raise HubError(f"{filename} of {self.repo_id!r} could not be fetched: {reason}") from error
        return Path(path)

    def _contents(self, revision: str | None) -> str:
        """Describe the contents of a repository that lacks the requested file."""
        try:
            names = HfApi(token=self.token).list_repo_files(self.repo_id, revision=revision)
        except CLIENT_ERRORS:
            names = []
        return describe_repository(names)


def locate(model_id: str, repo: HubRepo) -> tuple[Path, HubRepo | None]:
    """Return the path of a model's config, and the Hub repository it came from.

    Args:
        model_id: Path of a folder, or id of a Hub repository.
        repo: Repository to fetch from if `model_id` is not a folder.

    Returns:
        The path, and the repository or None for a local folder.

    Raises:
        CheckpointError: If `model_id` looks like a path and there is no such folder.
        HubError: If the repository cannot be reached, or holds no config.
    """
    folder = Path(model_id)
    try:
        if folder.is_dir():
            return folder / CONFIG_FILE, None
        path_like = folder.exists() or folder.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1
    except OSError:  # the id is too long for a path, and therefore for a Hub id
        path_like = True
    if path_like:
        raise CheckpointError(
            f"{model_id} is no folder. Pass the folder of a saved model or a Hub id such as user/name."
        )
    return repo.fetch(CONFIG_FILE), repo


def git_digests(path: Path) -> frozenset[str]:
    """Return the digests by which the Hub may identify a file: SHA-256 for a large file, git's SHA-1 for a regular one.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        sha256 = hashlib.sha256()
        sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                sha256.update(chunk)
                sha1.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Save the model again.") from error
    return frozenset({sha256.hexdigest(), sha1.hexdigest()})


def _is_intact(path: Path) -> bool:
    """Return whether the contents of a regular file of the cache match the git digest in its name.

    Weight files are named after their SHA-256, which is checked against config.json when they are loaded.
    """
    name = path.resolve().name
    return not re.fullmatch("[0-9a-f]{40}", name) or name in git_digests(path)

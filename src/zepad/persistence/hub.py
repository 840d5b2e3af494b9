"""Files from the Hugging Face Hub, all of one commit."""

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
    """Where to fetch from.

    Attributes:
        repo_id: Id of the repository, `"user/name"`.
        revision: Branch, tag or commit; None is the default branch.
        token: Access token, True for the stored one, False for none.
        cache_dir: Cache folder of the Hub client; None is its default.
        local_files_only: Use the cache alone.
        force_download: Fetch again what is cached.
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
            revision: Branch, tag or commit; None is that of the attribute.

        Returns:
            Its path; the parent folder is named after the resolved commit, which pins the files fetched next.

        Raises:
            HubError: If the repository, revision or file cannot be had; it says which, and what to do.
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
        """Fetch a file and parse it; what `parse` finds damaged is downloaded once more.

        The client checks the size of a download and not its digest, and what it once put into its cache it trusts.

        Args:
            filename: Name of the file in the repository.
            parse: Function of its path that raises `CheckpointError` if the file is damaged.
            revision: Branch, tag or commit; None is that of the attribute.

        Raises:
            CheckpointError: If the file is damaged on the Hub too, or in the cache and the Hub may not be asked.
            HubError: If the repository, revision or file cannot be had; it says which, and what to do.
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
        """Say what a repository without the file we want holds."""
        try:
            names = HfApi(token=self.token).list_repo_files(self.repo_id, revision=revision)
        except CLIENT_ERRORS:
            names = []
        return describe_repository(names)


def locate(model_id: str, repo: HubRepo) -> tuple[Path, HubRepo | None]:
    """Return the config of a local folder or of a Hub repository, and the repository if it is one.

    Raises:
        CheckpointError: If it reads like a path and no folder is there.
        HubError: If the repository cannot be had, or holds no config.
    """
    folder = Path(model_id)
    try:
        if folder.is_dir():
            return folder / CONFIG_FILE, None
        path_like = folder.exists() or folder.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1
    except OSError:  # too long for a path, and so for a Hub id
        path_like = True
    if path_like:
        raise CheckpointError(
            f"{model_id} is no folder. Pass the folder of a saved model or a Hub id such as user/name."
        )
    return repo.fetch(CONFIG_FILE), repo


def git_digests(path: Path) -> frozenset[str]:
    """Return the digests by which the Hub may know a file: sha256 of a large one, git's sha1 of a regular one.

    Raises:
        CheckpointError: If it cannot be read.
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
    """Whether a regular file of the cache, named after its git digest, is that file.

    Weight files are named after their sha256, which config.json vouches for and whoever reads them checks.
    """
    name = path.resolve().name
    return not re.fullmatch("[0-9a-f]{40}", name) or name in git_digests(path)

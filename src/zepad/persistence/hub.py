"""Models on the Hugging Face Hub: loaded from one commit, published as one commit."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from ..errors import CheckpointError, HubError, ZePADError

_T = TypeVar("_T")

_CONFIG_FILE = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WEIGHTS = (*_PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")

# The client lets the errors of its HTTP library through, which was requests, then httpx, then httpx2.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
_CLIENT_ERRORS: tuple[type[Exception], ...] = (_HTTPError, OSError, RuntimeError, ValueError, KeyError)


@dataclass(frozen=True, kw_only=True)
class HubRepo:
    """Where to fetch from.

    Attributes:
        repo_id: `"user/name"`.
        revision: Branch, tag or commit; None is the default branch.
        token: Access token, `True` for the stored one, `False` for none.
        cache_dir: Of the Hub client.
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
            filename: In the repository.
            parse: Raises `CheckpointError` if the file is damaged.
            revision: As in `fetch`.

        Raises:
            CheckpointError: If the file is damaged on the Hub too, or in the cache and the Hub may not be asked.
            HubError: As in `fetch`.
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
            path = _again(
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
        except _CLIENT_ERRORS as error:
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            reason = self._contents(revision) if absent else _explain(error, self.repo_id, revision)
            raise HubError(f"{filename} of {self.repo_id!r} could not be fetched: {reason}") from error
        return Path(path)

    def _contents(self, revision: str | None) -> str:
        """Say what a repository without the file we want holds."""
        try:
            names = HfApi(token=self.token).list_repo_files(self.repo_id, revision=revision)
        except _CLIENT_ERRORS:
            names = []
        return _describe(names)


def locate(model_id: str, repo: HubRepo) -> tuple[Path, HubRepo | None]:
    """Return the config of a local folder or of a Hub repository, and the repository if it is one.

    Raises:
        CheckpointError: If it reads like a path and no folder is there.
        HubError: If the repository cannot be had, or holds no config.
    """
    folder = Path(model_id)
    try:
        if folder.is_dir():
            return folder / _CONFIG_FILE, None
        path_like = folder.exists() or folder.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1
    except OSError:  # too long for a path, and so for a Hub id
        path_like = True
    if path_like:
        raise CheckpointError(
            f"{model_id} is no folder. Pass the folder of a saved model or a Hub id such as user/name."
        )
    return repo.fetch(_CONFIG_FILE), repo


# publishing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the Hub now holds.

    Attributes:
        repo_id: `"user/name"`.
        revision: Sha of the commit that has the files.
        url: Of that commit.
    """

    repo_id: str
    revision: str
    url: str


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
    files: Sequence[str],
    obsolete: Sequence[str],
) -> Published:
    """Put files of a folder on the Hub in one commit: all of them or none, whatever fails.

    Files that the Hub already has are not sent, and if it has them all no commit is made, so a push may be repeated.

    Args:
        folder: Where the files are.
        repo_id: `"user/name"`, or `"name"` for the user of the token; created if need be.
        private: Of a new repository; `True` refuses an existing public one, and otherwise that stays as it is.
        revision: A branch, created from the default one if need be; None is the default one.
        token: Access token, `True` or None for the stored one, `False` for none.
        commit_message: Its title.
        files: Names of what is sent. Nothing else is.
        obsolete: Names of what an earlier push may have left, deleted in the same commit.

    Raises:
        CheckpointError: If a file is missing from the folder.
        HubError: If nothing was published, or it cannot be told; it says which, why, and what to do.
    """
    failed = f"nothing was published to {repo_id!r}"
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise HubError(f"{failed}: revision {revision} is a commit. Pass the name of a branch.")
    digests = {name: _digests(folder / name) for name in files}
    api = HfApi(token=token)
    with _translated(failed, repo_id, revision):
        repo_id = _again(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        try:
            head, branch_exists = _info(api, repo_id, revision), True
        except RevisionNotFoundError:
            head, branch_exists = _info(api, repo_id, None), False
        if private and not head.private:
            raise HubError(
                f"{failed}: it is public, and private=True was asked for. "
                "Make it private on its page, choose another repo_id, or leave private out."
            )
        if _differing(head, {_CONFIG_FILE: digests.get(_CONFIG_FILE, frozenset())}):
            _refuse_foreign(head, HubRepo(repo_id=repo_id, token=token), failed)
        if not branch_exists:
            _again(lambda: api.create_branch(repo_id, branch=str(revision), revision=head.sha, exist_ok=True))
    return _commit(api, repo_id, revision, head, folder, commit_message, digests, obsolete)


def _commit(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    head: ModelInfo,
    folder: Path,
    message: str,
    digests: Mapping[str, frozenset[str]],
    obsolete: Sequence[str],
) -> Published:
    """Commit on top of `head`; after an error the branch tells whether the commit was made."""
    send, delete = _differing(head, digests), _present(head, obsolete)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in send),
        *(CommitOperationDelete(path_in_repo=name) for name in delete),
    ]

    def published(sha: str | None) -> Published:
        return Published(repo_id=repo_id, revision=str(sha), url=f"{api.endpoint}/{repo_id}/commit/{sha}")

    def attempt(*, retry: bool) -> Published:
        try:
            # Pinned to the head that was looked at: the Hub refuses if somebody commits in between.
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha
            )
        except _CLIENT_ERRORS as error:
            reason = _explain(error, repo_id, revision)
            unknown = (
                f"it is unknown whether {repo_id!r} was published: {reason} Run it again: what is there is not "
                "committed twice. The branch could not be read"
            )
            with _translated(unknown, repo_id, revision):
                now = _info(api, repo_id, revision)
            if not _differing(now, digests) and not _present(now, obsolete):
                return published(now.sha)  # only the answer was lost
            if now.sha != head.sha:
                raise HubError(
                    f"nothing was published to {repo_id!r}: somebody else committed in the meantime ({head.sha} is "
                    f"now {now.sha}). Look at what it holds, and run it again to publish on top of it."
                ) from error
            if retry and _is_transient(error):
                return attempt(retry=False)
            raise HubError(f"nothing was published to {repo_id!r}: {reason}") from error
        return published(commit.oid)

    return attempt(retry=True) if operations else published(head.sha)


def _info(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """Return the commit of a branch with the digests of its files."""
    return _again(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))


def _differing(head: ModelInfo, digests: Mapping[str, frozenset[str]]) -> list[str]:
    """Names of the files that a commit lacks or has otherwise."""
    there = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in head.siblings or ()}
    return [name for name, own in digests.items() if there.get(name) not in own]


def _present(head: ModelInfo, names: Iterable[str]) -> list[str]:
    there = {sibling.rfilename for sibling in head.siblings or ()}
    return [name for name in names if name in there]


def _refuse_foreign(head: ModelInfo, repo: HubRepo, failed: str) -> None:
    """Raise if a commit holds a model that zepad did not write."""
    if _present(head, [_CONFIG_FILE]):
        with tempfile.TemporaryDirectory() as cache:
            path = replace(repo, cache_dir=cache).fetch(_CONFIG_FILE, revision=head.sha)
            foreign = not _is_our_config(path)
    else:
        foreign = any(sibling.rfilename.endswith(_WEIGHTS) for sibling in head.siblings or ())
    if foreign:
        raise HubError(
            f"{failed}: it holds a model that zepad did not write. "
            "Choose another repo_id, or delete that model's files on the Hub first."
        )


def _is_our_config(path: Path) -> bool:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("library") == "zepad"


# digests --------------------------------------------------------------------------------------------------------


def _digests(path: Path) -> frozenset[str]:
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
    return not re.fullmatch("[0-9a-f]{40}", name) or name in _digests(path)


# errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def _translated(failed: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the client raises into a `HubError`."""
    try:
        yield
    except ZePADError:
        raise
    except _CLIENT_ERRORS as error:
        raise HubError(f"{failed}: {_explain(error, repo_id, revision)}") from error


def _again(call: Callable[[], _T]) -> _T:
    """Call once more if the Hub or the connection stumbled, which for most requests the client does not do."""
    try:
        return call()
    except _CLIENT_ERRORS as error:
        if not _is_transient(error):
            raise
        return call()


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, OfflineModeIsEnabled)):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (_HTTPError, OSError))


def _describe(names: Sequence[str]) -> str:
    """Say what a repository that lacks a file holds, by the names of its files."""
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    shown = ", ".join(weights[:5]) or ", ".join(names[:5]) or "no file we could list"
    if _CONFIG_FILE in names:
        return f"the repository does not have it (it has {shown}). Publish the model again, whole, with push_to_hub."
    if weights and all(name.endswith(_PICKLES) for name in weights):
        return (
            f"the repository holds pickles alone ({shown}). zepad never loads pickles, since that runs whatever code "
            "is in them: nothing was downloaded. Ask for the model as published by zepad's push_to_hub."
        )
    return f"the repository is no zepad model (it has {shown}). Pass the id of one published with push_to_hub."


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say what an error of the client means and what to do."""
    # The client's own wrappers say less than the answer or the broken connection that they wrap.
    while error.__cause__ and (isinstance(error, LocalEntryNotFoundError) or not isinstance(error, _HTTPError)):
        error = error.__cause__
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no id of a repository. Write it as user/name. ({said})"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            "it is not in the cache, and local_files_only=True or HF_HUB_OFFLINE=1 forbids asking the Hub. "
            "Load this revision once online, or check the name, the revision and cache_dir."
        )
    if isinstance(error, GatedRepoError):
        return "the repository is gated. Ask for access on its page, and pass the token of the account that has it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and the token does not open it. "
            "Check the id, and pass the token of an account that may see it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}. Pass one of its branches, tags or commits."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub wants a token that it knows (401). Pass a valid token, or log in again with hf auth login."
        if status == 403:
            return f"the token does not give that right (403). Pass one that may read or write {repo_id!r}. ({said})"
        if status == 429:
            return f"the Hub has had too many requests (429). Wait some minutes and run it again. ({said})"
        if status >= 500:
            return f"the Hub is out of order ({status}). Run it again later; see status.huggingface.co. ({said})"
        return f"the Hub refused ({status}). Check what was asked for. ({said})"
    if isinstance(error, json.JSONDecodeError):
        return f"the answer makes no sense. Run it again later; check HF_ENDPOINT and any proxy. ({said})"
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return f"a file could not be read or written here. Check the disk and the cache folder. ({said})"
    if isinstance(error, (_HTTPError, OSError)):
        return f"the connection failed. Check it, and run it again. ({said})"
    return f"{said}. Check what was asked for, and the connection, and run it again."

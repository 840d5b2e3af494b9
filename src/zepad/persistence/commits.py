"""Upload of files to the Hugging Face Hub in one commit."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from ..errors import HubError
from ..files import read_bytes
from .config import CONFIG_FILE, MAX_CONFIG_BYTES, is_config
from .hub import HubRepo, git_digests
from .hub_errors import CLIENT_ERRORS, WEIGHT_SUFFIXES, again, explain, is_transient, translated


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model that was published on the Hub.

    Attributes:
        repo_id: Id of the repository, `"user/name"`.
        revision: SHA of the commit that holds the files.
        url: URL of the commit.
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
    """Upload files of a folder to the Hub in one commit, so that either all of them are published or none.

    Files that the Hub already has are not sent. If it has all of them no commit is made, so a push may be repeated.

    Args:
        folder: Folder that holds the files.
        repo_id: Id of the repository, `"user/name"`, or `"name"` for the user of the token. It is created if it does
            not exist.
        private: Visibility of a new repository. The visibility of an existing one never changes; True raises an error
            if it is public.
        revision: Branch, which is created from the default one if it does not exist; None is the default branch.
        token: Access token, True or None for the stored one, False for none.
        commit_message: First line of the commit message.
        files: Names of the files to send. No other file is sent.
        obsolete: Names of files from earlier pushes to delete in the same commit.

    Returns:
        Repository, commit and URL.

    Raises:
        CheckpointError: If a file is missing from the folder.
        HubError: If nothing was published, or it is unknown whether it was.
    """
    failed = f"nothing was published to {repo_id!r}"
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise HubError(f"{failed}: revision {revision} is a commit. Pass the name of a branch.")
    digests = {name: git_digests(folder / name) for name in files}
    api = HfApi(token=token)
    with translated(failed, repo_id, revision):
        repo_id = again(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        try:
            head, branch_exists = _info(api, repo_id, revision), True
        except RevisionNotFoundError:
            head, branch_exists = _info(api, repo_id, None), False
        if private and not head.private:
            raise HubError(
                f"{failed}: it is public, and private=True was asked for. "
                "Make it private on its page, choose another repo_id, or leave private out."
            )
        if _differing(head, {CONFIG_FILE: digests.get(CONFIG_FILE, frozenset())}):
            _refuse_foreign(head, HubRepo(repo_id=repo_id, token=token), failed)
        if not branch_exists:
            again(lambda: api.create_branch(repo_id, branch=str(revision), revision=head.sha, exist_ok=True))
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
    """Commit on top of `head`, and find out after an error whether the commit was made."""
    send, delete = _differing(head, digests), _present(head, obsolete)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in send),
        *(CommitOperationDelete(path_in_repo=name) for name in delete),
    ]

    def published(sha: str | None) -> Published:
        return Published(repo_id=repo_id, revision=str(sha), url=f"{api.endpoint}/{repo_id}/commit/{sha}")

    def attempt(*, retry: bool) -> Published:
        try:
            # With parent_commit the Hub rejects the commit if another one was made in the meantime.
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha
            )
        except CLIENT_ERRORS as error:
            reason = explain(error, repo_id, revision)
            unknown = (
                f"it is unknown whether {repo_id!r} was published: {reason} Run it again: what is there is not "
                "committed twice. The branch could not be read"
            )
            with translated(unknown, repo_id, revision):
                now = _info(api, repo_id, revision)
            if not _differing(now, digests) and not _present(now, obsolete):
                return published(now.sha)  # the commit was made, and only the response was lost
            if now.sha != head.sha:
                raise HubError(
                    f"nothing was published to {repo_id!r}: somebody else committed in the meantime ({head.sha} is "
                    f"now {now.sha}). Look at what it holds, and run it again to publish on top of it."
                ) from error
            if retry and is_transient(error):
                return attempt(retry=False)
            raise HubError(f"nothing was published to {repo_id!r}: {reason}") from error
        return published(commit.oid)

    return attempt(retry=True) if operations else published(head.sha)


def _info(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """Return the commit of a branch with the digests of its files."""
    return again(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))


def _differing(head: ModelInfo, digests: Mapping[str, frozenset[str]]) -> list[str]:
    """Return the names of the files that a commit lacks or holds with other contents."""
    there = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in head.siblings or ()}
    return [name for name, own in digests.items() if there.get(name) not in own]


def _present(head: ModelInfo, names: Iterable[str]) -> list[str]:
    there = {sibling.rfilename for sibling in head.siblings or ()}
    return [name for name in names if name in there]


def _refuse_foreign(head: ModelInfo, repo: HubRepo, failed: str) -> None:
    """Raise if a commit holds a model that zepad did not write."""
    if _present(head, [CONFIG_FILE]):
        with tempfile.TemporaryDirectory() as cache:
            path = replace(repo, cache_dir=cache).fetch(CONFIG_FILE, revision=head.sha)
            foreign = not is_config(read_bytes(path, limit=MAX_CONFIG_BYTES))
    else:
        foreign = any(sibling.rfilename.endswith(WEIGHT_SUFFIXES) for sibling in head.siblings or ())
    if foreign:
        raise HubError(
            f"{failed}: it holds a model that zepad did not write. "
            "Choose another repo_id, or delete that model's files on the Hub first."
        )

"""Files of a published model, all of one resolved revision of its Hub repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .errors import CheckpointError, HubError


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
            HubError: If the repository, revision or file cannot be had.
        """
        try:
            path = hf_hub_download(
                self.repo_id,
                filename,
                revision=revision or self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, RuntimeError, ValueError) as error:
            raise HubError(
                f"{filename} of {self.repo_id!r} could not be fetched: {type(error).__name__}: {error} "
                "Check the name, the revision, the token and the connection."
            ) from error
        return Path(path)


def locate(model_id: str, repo: HubRepo) -> tuple[Path, HubRepo | None]:
    """Return the config of a local folder or of a Hub repository, and the repository if it is one.

    Raises:
        CheckpointError: If it reads like a path and no folder is there.
        HubError: If the repository cannot be had.
    """
    folder = Path(model_id)
    try:
        if folder.is_dir():
            return folder / "config.json", None
        path_like = folder.exists() or folder.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1
    except OSError:  # too long for a path, and so for a Hub id
        path_like = True
    if path_like:
        raise CheckpointError(
            f"{model_id} is no folder. Pass the folder of a saved model or a Hub id such as user/name."
        )
    return repo.fetch("config.json"), repo

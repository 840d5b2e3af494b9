"""Explanations of the errors of the Hub client."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, ZePADError
from .config import CONFIG_FILE

_T = TypeVar("_T")

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHT_SUFFIXES = (*_PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
"""Suffixes of files that hold model weights, of any library."""

# The client raises the errors of its HTTP library, which was requests, then httpx, then httpx2.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
CLIENT_ERRORS: tuple[type[Exception], ...] = (_HTTPError, OSError, RuntimeError, ValueError, KeyError)
"""Exceptions that the client is known to raise."""


@contextmanager
def translated(failed: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn every exception of the client into a `HubError`."""
    try:
        yield
    except ZePADError:
        raise
    except CLIENT_ERRORS as error:
        raise HubError(f"{failed}: {explain(error, repo_id, revision)}") from error


def again(call: Callable[[], _T]) -> _T:
    """Return the result of a request, which is repeated once after a temporary failure of the Hub or the connection.

    The client itself does not repeat most requests.
    """
    try:
        return call()
    except CLIENT_ERRORS as error:
        if not is_transient(error):
            raise
        return call()


def is_transient(error: Exception) -> bool:
    """Return whether a request that failed with this error may succeed when it is repeated."""
    if isinstance(error, (FileNotFoundError, PermissionError, OfflineModeIsEnabled)):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (_HTTPError, OSError))


def describe_repository(names: Sequence[str]) -> str:
    """Describe the contents of a repository that lacks a file, by the names of its files."""
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    shown = ", ".join(weights[:5]) or ", ".join(names[:5]) or "no file we could list"
    if CONFIG_FILE in names:
        return f"the repository does not have it (it has {shown}). Publish the model again, whole, with push_to_hub."
    if weights and all(name.endswith(_PICKLES) for name in weights):
        return (
            f"the repository holds pickles alone ({shown}). zepad never loads pickles, since that runs whatever code "
            "is in them: nothing was downloaded. Ask for the model as published by zepad's push_to_hub."
        )
    return f"the repository is no zepad model (it has {shown}). Pass the id of one published with push_to_hub."


def explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Describe the cause of a client error and how to resolve it."""
    # The errors that the client wraps are more specific than its own.
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

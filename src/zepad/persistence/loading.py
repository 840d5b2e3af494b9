"""A saved model from a folder or the Hub: which file comes from where, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from torch import Tensor, nn

from ..encoders import Encoder
from ..errors import CheckpointError
from ..files import open_regular
from ..types import ENCODER_ROLES, Role
from .config import DETECTOR_FILE, ENCODER_FILES, HEADS_FILE, Base
from .contents import Home, SavedModel
from .folder import OpenedFolder
from .hub import HubRepo, locate
from .rebuilding import plan_encoder, rebuild_detector, rebuild_encoder, rebuild_heads
from .weights import check_weights, read_weights

_T = TypeVar("_T")


class SavedFiles:
    """The files of one saved model, all of one save, and of one commit where they come from the Hub.

    A context manager, which closes the files.

    Args:
        config_path: Path of config.json. The other files lie beside it, or are fetched.
        remote: Repository that config.json came from, or None if it lies in a folder of the user's.
        repo: Repository and how to access it.

    Raises:
        CheckpointError: If the config is damaged.
    """

    def __init__(self, config_path: Path, remote: HubRepo | None, repo: HubRepo) -> None:
        self._folder = config_path.parent
        self._opened = OpenedFolder(self._folder)
        self.config = self._opened.config
        self._remote = None if remote is None else replace(remote, revision=self._folder.name)
        base = self.config.base
        self._base = None if base is None else replace(repo, repo_id=base.repo_id, revision=base.revision)

    def __enter__(self) -> SavedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    @property
    def home(self) -> Home | None:
        """Where the encoders' files are on the Hub, or None if they are not there."""
        base = self.config.base
        if base is None and self._remote is not None:
            base = Base(repo_id=self._remote.repo_id, revision=self._folder.name)
        return None if base is None else Home(base=base, files=self.config.files)

    def fetched(self, name: str) -> Path:
        """Return the path of a file of the repository, downloaded if need be.

        Raises:
            HubError: If the Hub cannot deliver.
        """
        return self._fetched(name, lambda path: path)

    def verified(self, name: str) -> Path:
        """Return the path of a weight file of the repository whose size and digest are those that the config states.

        Raises:
            CheckpointError: If the file has another size or content.
            HubError: If the Hub cannot deliver.
        """

        def check(path: Path) -> Path:
            _opened(path, lambda file: check_weights(file, self.config.files[name]))
            return path

        return self._fetched(name, check)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a weight file.

        Raises:
            CheckpointError: If the file has another size or content, or is no safetensors file.
            HubError: If the Hub cannot deliver.
        """

        def read(file: BinaryIO) -> dict[str, Tensor]:
            return read_weights(file, self.config.files[name])

        if self._source(name) is None:
            return read(self._opened.open(name))
        return self._fetched(name, lambda path: _opened(path, read))

    def _fetched(self, name: str, parse: Callable[[Path], _T]) -> _T:
        source = self._source(name)
        assert source is not None  # callers ask only for what lies on the Hub
        return source.read(name, parse)

    def _source(self, name: str) -> HubRepo | None:
        """Return the repository that a file is fetched from, or None if it lies in the folder."""
        from_base = self._base is not None and name in ENCODER_FILES
        if from_base and not (self._remote is None and self._opened.has(name)):
            return self._base
        return self._remote


def load_saved(
    model_id: str, repo: HubRepo, *, branches: Collection[Role] | None, modules: Mapping[str, nn.Module]
) -> SavedModel:
    """Read a saved model strictly, and no file that is not needed.

    Args:
        model_id: A folder, or a Hub id.
        repo: Repository and how to access it.
        branches: Roles of the encoders to load, without heads; None loads everything.
        modules: Architectures of custom encoders, by role.

    Returns:
        The model, its encoders frozen and all parts in evaluation mode.

    Raises:
        CheckpointError: If anything is missing, damaged, or does not fit.
        ConfigError: If a source no longer knows an encoder's name.
        HubError: If the Hub cannot deliver.
    """
    with SavedFiles(*locate(model_id, repo), repo) as files:
        config, whole = files.config, branches is None
        roles = [role for role in ENCODER_ROLES if role in config.encoders and (branches is None or role in branches)]
        plans = {role: plan_encoder(role, config, modules) for role in roles}  # before any download
        encoders: dict[str, Encoder] = {}
        for role, plan in plans.items():
            name = config.encoder_file(role)
            encoders[role] = rebuild_encoder(config.encoders[role], plan, files.weights(name), name)
        heads = rebuild_heads(config, files.weights(HEADS_FILE), HEADS_FILE) if config.heads and whole else {}
        fitted = files.weights(DETECTOR_FILE) if DETECTOR_FILE in config.files and whole else None
        detector = rebuild_detector(config, fitted, DETECTOR_FILE)
        return SavedModel(config=config, encoders=encoders, heads=heads, detector=detector, home=files.home)


def _opened(path: Path, parse: Callable[[BinaryIO], _T]) -> _T:
    """Return what a function makes of a file in the cache of the Hub client."""
    try:
        with open_regular(path) as file:
            return parse(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Download the model again.") from error

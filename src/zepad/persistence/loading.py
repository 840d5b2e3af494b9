"""A saved model from a folder or the Hub: which file comes from where, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from ..encoders import Encoder
from ..modules import Detector
from ..types import ENCODER_ROLES, Role
from .config import (
    DETECTOR_FILE,
    ENCODER_FILES,
    HEADS_FILE,
    Base,
    SavedConfig,
    check_weights,
    encoder_file,
    plan_encoder,
    read_config,
    read_weights,
    rebuild_detector,
    rebuild_encoder,
    rebuild_heads,
)
from .hub import HubRepo, locate

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a saved model holds.

    Attributes:
        config: Of the model.
        encoders: By role, frozen and in evaluation mode.
        heads: By role, in evaluation mode.
        detector: Fitted if it was when it was saved.
        home: The repository and commit that hold the encoders' files, if they are on the Hub.
    """

    config: SavedConfig
    encoders: dict[str, Encoder]
    heads: dict[str, nn.Module]
    detector: Detector
    home: Base | None


class SavedFiles:
    """The files of one saved model, all of one commit where they come from the Hub.

    Args:
        config_path: Of config.json; the others lie beside it, or are fetched.
        remote: The repository it came from, or None if it lies in a folder of the user's.
        repo: How to reach the Hub.

    Raises:
        CheckpointError: If the config is damaged.
    """

    def __init__(self, config_path: Path, remote: HubRepo | None, repo: HubRepo) -> None:
        self.config = read_config(config_path)
        self._folder = config_path.parent
        self._remote = None if remote is None else replace(remote, revision=self._folder.name)
        base = self.config.base
        self._base = None if base is None else replace(repo, repo_id=base.repo_id, revision=base.revision)

    @property
    def home(self) -> Base | None:
        """The repository and commit that hold the encoders' files, if they are on the Hub."""
        if self.config.base is not None or self._remote is None:
            return self.config.base
        return Base(repo_id=self._remote.repo_id, revision=self._folder.name)

    def path(self, name: str) -> Path:
        """Return a file beside the config, or of the base repository; downloaded if need be."""
        return self._parsed(name, lambda path: path)

    def verified(self, name: str) -> Path:
        """Return a weight file that is the one the config vouches for.

        Raises:
            CheckpointError: If it is not that file.
            HubError: If the Hub cannot deliver.
        """

        def check(path: Path) -> Path:
            check_weights(path, self.config.files[name])
            return path

        return self._parsed(name, check)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a weight file. Errors as `verified`."""
        return self._parsed(name, lambda path: read_weights(path, self.config.files[name]))

    def _parsed(self, name: str, parse: Callable[[Path], _T]) -> _T:
        source = self._source(name)
        return parse(self._folder / name) if source is None else source.read(name, parse)

    def _source(self, name: str) -> HubRepo | None:
        """Where a file is fetched from; None is the folder itself."""
        from_base = self._base is not None and name in ENCODER_FILES
        if from_base and not (self._remote is None and (self._folder / name).exists()):
            return self._base
        return self._remote


def load_saved(
    model_id: str, repo: HubRepo, *, branches: Collection[Role] | None, modules: Mapping[str, nn.Module]
) -> Saved:
    """Read a saved model strictly, and no file that is not needed.

    Args:
        model_id: A folder, or a Hub id.
        repo: How to reach the Hub.
        branches: Encoders to load, without heads; None loads everything.
        modules: Architectures of custom encoders, by role.

    Raises:
        CheckpointError: If anything is missing, damaged, or does not fit.
        ConfigError: If a source no longer knows an encoder's name.
        HubError: If the Hub cannot deliver.
    """
    files = SavedFiles(*locate(model_id, repo), repo)
    config = files.config
    roles = [role for role in ENCODER_ROLES if role in config.encoders and (branches is None or role in branches)]
    plans = {role: plan_encoder(role, config, modules) for role in roles}  # all of them before any file is fetched
    encoders: dict[str, Encoder] = {}
    for role, plan in plans.items():
        name = encoder_file(role)
        encoders[role] = rebuild_encoder(config.encoders[role], plan, files.weights(name), name)
    heads = rebuild_heads(config, files.weights(HEADS_FILE), HEADS_FILE) if config.heads and branches is None else {}
    fitted = DETECTOR_FILE in config.files and branches is None
    detector = rebuild_detector(config, files.weights(DETECTOR_FILE) if fitted else None, DETECTOR_FILE)
    return Saved(config=config, encoders=encoders, heads=heads, detector=detector, home=files.home)

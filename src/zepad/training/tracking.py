"""Experiment trackers, as Accelerate knows them, as a callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from ..arguments import checked
from ..config import require
from ..errors import ConfigError, InputError
from ..files import writing
from .accelerator import make_accelerator
from .callbacks import Callback, TrainingStatus


class Tracker(Callback):
    """Logs the training to TensorBoard, Weights & Biases, trackio or any other tracker that Accelerate knows.

    Every value is logged under the name of its branch, as in `"victim/loss"` or `"benign/val_benign_accuracy"`, and
    those of single updates under `"victim/step/loss"`; the second stage of a recipe logs under
    `"victim adaptation/loss"`. The step is the number of updates of all branches so far, in the order in which they
    are trained, and goes on from there where a training is resumed.

    One object is one run of the tracker: it begins with the first stage and ends with the `with` block or with
    `finish`. Pass the same object to `harden` and `fit_benign`. With several processes only the main one logs.

    Args:
        log_with: Name of a tracker, such as `"tensorboard"`, `"wandb"` or `"trackio"`, an object of a class derived
            from `accelerate.tracking.GeneralTracker`, or a list of these.
        project_dir: Folder for trackers that write files of their own, such as TensorBoard. The files lie in a folder
            in it that is called as the project.
        project_name: Name of the project.
        log_every: Number of updates from one logged update to the next; None logs epochs alone.
        config: Settings to show beside the run, such as `config.to_dict()`.
        init_kwargs: Further arguments by name of the tracker, such as `{"wandb": {"mode": "offline"}}`.

    Raises:
        ConfigError: If a tracker is not known or not installed, or lacks its folder.

    Examples:
        >>> tracker = Tracker("tensorboard", "runs", log_every=50)
    """

    @checked
    def __init__(
        self,
        log_with: str | GeneralTracker | Sequence[str | GeneralTracker],
        project_dir: str | Path | None = None,
        *,
        project_name: str = "zepad",
        log_every: int | None = None,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._log_with = [log_with] if isinstance(log_with, (str, GeneralTracker)) else list(log_with)
        require(bool(self._log_with), "log_with", log_with, "at least one tracker")
        require(log_every is None or log_every >= 1, "log_every", log_every, "at least 1, or None")
        for tracker in self._log_with:
            if isinstance(tracker, str):
                _check_tracker(tracker, project_dir)
        self._folder, self._name, self._every = project_dir, project_name, log_every
        self._config = None if config is None else dict(config)
        self._init_kwargs = {name: dict(values) for name, values in (init_kwargs or {}).items()}
        self._accelerator: Any = None
        self._before, self._last = 0, 0  # updates of the branches before, and of the present one

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def on_stage_begin(self, status: TrainingStatus) -> None:
        """Begin the run of the tracker with the first stage.

        Raises:
            InputError: If the folder cannot be written.
        """
        if self._accelerator is None:
            self._accelerator = self._start()
        self._before, self._last = self._before + self._last, status.step

    def on_step_end(self, status: TrainingStatus) -> None:
        """Log every n-th update."""
        self._last = status.step
        if self._every is not None and status.step % self._every == 0:
            self._log(status, "/step")

    def on_epoch_end(self, status: TrainingStatus) -> None:
        """Log an epoch."""
        self._log(status, "")

    def finish(self) -> None:
        """End the run of the tracker, where it has begun: what is still open is sent and closed."""
        if self._accelerator is not None:
            # Accelerator.end_training would also end the group of processes, which may train on.
            for tracker in self._accelerator.trackers:
                tracker.finish()
        self._accelerator, self._before, self._last = None, 0, 0

    def _start(self) -> Any:
        accelerator = make_accelerator(0, log_with=self._log_with, project_dir=self._folder)
        with writing(f"project_dir {self._folder}", InputError):
            accelerator.init_trackers(self._name, config=self._config, init_kwargs=self._init_kwargs)
        return accelerator

    def _log(self, status: TrainingStatus, of: str) -> None:
        branch = status.branch if status.stage != "adaptation" else f"{status.branch} adaptation"
        values = {f"{branch}{of}/{name}": value for name, value in status.metrics.items() if name != "step"}
        self._accelerator.log({**values, f"{branch}{of}/epoch": status.epoch}, step=self._before + status.step)


def _check_tracker(name: str, folder: str | Path | None) -> None:
    """Refuse a tracker that Accelerate would leave out without a word, or fail on once the training begins.

    Raises:
        ConfigError: If its name is not known, its package is not installed, or its folder is missing.
    """
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))  # with those that were registered by others
    if name not in known:
        raise ConfigError(f"log_with must name one of {', '.join(known)}; got {name!r}.")
    if name in LoggerType.list() and name not in map(str, get_available_trackers()):
        raise ConfigError(f"{name} is not installed. Install it with: pip install {name}.")
    if folder is None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        raise ConfigError(f'{name} writes files. Say where: Tracker("{name}", project_dir="runs").')

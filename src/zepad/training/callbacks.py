"""Callbacks: what training tells of itself while it runs, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..seeding import restored

TrainingStage = Literal["hardening", "adaptation", "benign"]
"""What a branch is trained for: hardening, the second stage of a recipe that has one, or clean images."""


@dataclass(frozen=True, kw_only=True)
class TrainingStatus:
    """Where the training of one branch stands.

    Attributes:
        stage: `"hardening"`, `"adaptation"` (the second stage of a recipe that has one) or `"benign"`.
        branch: Name of the branch: `"victim"`, `"auxiliary"` or `"benign"`; `"encoder"` for an encoder alone.
        epoch: Number of complete epochs, those before a resumption included.
        epochs: Number of epochs in all.
        step: Number of updates of the weights so far, those before a resumption included.
        metrics: Loss, learning rates `lr` and `head_lr`, and accuracies in [0, 1] as far as the recipe computes them:
            those of the update after a step, those of the epoch with the ones on held-out images after an epoch, none
            when a stage begins.
        history: The metrics and the `step` of each complete epoch.
    """

    stage: TrainingStage
    branch: str
    epoch: int
    epochs: int
    step: int
    metrics: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raised by a callback to end the training of a branch early.

    The branch ends with the epoch in progress, which is validated and kept like every other, and has the weights of its
    best epoch so far. Training goes on with the next branch. A stage that begins before any epoch was trained trains
    one.
    """


class Callback:
    """Base class of objects that are told of the training. A subclass overrides the methods that it needs.

    With several processes only the main one calls them. They cannot change the training but by raising:
    `StopTraining` ends the branch early, and any other error ends the call, which leaves the model unchanged.

    Examples:
        >>> class Log(Callback):
        ...     def on_epoch_end(self, status):
        ...         print(f"{status.branch}: epoch {status.epoch} of {status.epochs}")
        >>> from zepad import HardenConfig
        >>> from zepad.data import digits
        >>> from zepad.encoders import SmallResNet
        >>> from zepad.training import harden_branch
        >>> batch = digits("train").images[:8], digits("train").labels[:8]
        >>> config = HardenConfig(epochs=2, steps=1)
        >>> told = {"num_classes": 10, "progress": False, "callbacks": [Log()]}
        >>> branch, history = harden_branch(SmallResNet(width=2), [batch], config, **told)
        encoder: epoch 1 of 2
        encoder: epoch 2 of 2
    """

    def on_stage_begin(self, status: TrainingStatus) -> None:
        """Learn that a branch is about to be trained, or to be gone on with."""

    def on_step_end(self, status: TrainingStatus) -> None:
        """Learn of an update of the weights."""

    def on_epoch_end(self, status: TrainingStatus) -> None:
        """Learn of an epoch that was validated and, where checkpoints are kept, saved."""


Event = Literal["on_stage_begin", "on_step_end", "on_epoch_end"]


class Reporter:
    """Tells the callbacks of one run, on the main process, and lets all processes know when to stop.

    Args:
        callbacks: The callbacks.
        stage: Stage of the run.
        branch: Name of its branch.
        epochs: Number of its epochs.
        accelerator: Accelerator of the run.
    """

    def __init__(
        self, callbacks: Sequence[Callback], stage: TrainingStage, branch: str, epochs: int, accelerator: Accelerator
    ) -> None:
        self._callbacks = tuple(callbacks) if accelerator.is_main_process else ()
        self._stage, self._branch, self._epochs = stage, branch, epochs
        self._stopped = False

    def tell(
        self, event: Event, step: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]
    ) -> None:
        """Call one method of every callback, also of those behind one that asks to stop.

        Args:
            event: Name of the method.
            step: Number of updates so far.
            metrics: What was just measured.
            history: The records of the complete epochs.
        """
        if not self._callbacks:
            return
        status = TrainingStatus(
            stage=self._stage,
            branch=self._branch,
            epoch=len(history),
            epochs=self._epochs,
            step=step,
            metrics=MappingProxyType(dict(metrics)),
            history=tuple(map(MappingProxyType, history)),
        )
        # What a callback draws amid an epoch must not change what training draws next.
        with restored() if event == "on_step_end" else nullcontext():
            for callback in self._callbacks:
                self._call(callback, event, status)

    def _call(self, callback: Callback, event: Event, status: TrainingStatus) -> None:
        try:
            getattr(callback, event)(status)
        except StopTraining:
            self._stopped = True

    def is_asked_to_stop(self) -> bool:
        """Return whether a callback has asked to stop, the same on every process."""
        answer = [self._stopped]
        broadcast_object_list(answer)
        return answer[0]

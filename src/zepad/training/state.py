"""What changes from epoch to epoch: kept on disk after each, resumed from, and at last the best of it installed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast

from ..errors import CheckpointError
from ..modules import Branch
from .checkpoints import load_latest, save_epoch


@dataclass(kw_only=True)
class TrainingState:
    """The state of a run between two epochs.

    Attributes:
        branch: The branch in training.
        optimizer: Its optimizer.
        batches: Number of batches in an epoch; None until the first one ends, where the loader does not know.
        history: One record per epoch.
        best: Epoch, score and weights of the best epoch so far; None before there is a validation score.
    """

    branch: Branch
    optimizer: torch.optim.Optimizer
    batches: int | None
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def record(self, epoch: int, record: dict[str, float]) -> None:
        """Note the record of an epoch, and its weights if they are the best yet by validation accuracy."""
        self.history.append(record)
        score = record.get("val_adversarial_accuracy", record.get("val_benign_accuracy"))
        # In a tie the later epoch is kept, because it has been trained longer.
        if score is not None and (self.best is None or score >= self.best["score"]):
            weights = {key: value.detach().cpu().clone() for key, value in self.branch.state_dict().items()}
            self.best = {"epoch": epoch, "score": score, "weights": weights}

    def save(self, folder: Path, epoch: int, fingerprint: dict[str, Any]) -> None:
        """Write the state after an epoch to a folder.

        Args:
            folder: Folder for the checkpoints of this run.
            epoch: Number of the epoch, from zero.
            fingerprint: Values on which a resumed run must agree.
        """
        state = {
            "fingerprint": fingerprint,
            "epoch": epoch,
            "batches": self.batches,
            "weights": self.branch.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
        }
        save_epoch(folder, epoch, state)

    def resume(self, folder: Path, fingerprint: dict[str, Any]) -> int:
        """Restore the newest epoch in a folder and return the number of the next epoch.

        Args:
            folder: Folder that `save` wrote to; it may be empty.
            fingerprint: Values on which the saved run must agree.

        Raises:
            CheckpointError: If the file is damaged, or of a run with other settings or another architecture.
        """
        state = load_latest(folder, fingerprint)
        if state is None:
            return 0
        try:
            self.branch.load_state_dict(state["weights"])
            _load_optimizer(self.optimizer, state["optimizer"])
        except Exception as error:  # torch checks little of an optimizer's state before it uses it
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint in {folder} is of another architecture: {reason} Resume with the encoder that it is "
                "of, or choose another folder."
            ) from error
        self.history, self.best, self.batches = state["history"], state["best"], state["batches"]
        return int(state["epoch"]) + 1

    def install_best(self, processes: int) -> None:
        """Give the branch the weights of the best epoch, the same on every process, and put it in evaluation mode."""
        if self.best is not None:
            self.branch.load_state_dict(self.best["weights"])
        if processes > 1:  # BatchNorm statistics are those of the main process everywhere
            self.branch.load_state_dict({k: broadcast(v) for k, v in self.branch.state_dict().items()})
        self.branch.eval()


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give Adam its averages and step numbers, and nothing else.

    Raises:
        ValueError: If settings differ, or a tensor does not fit its parameter.
    """
    own = [_settings(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if [_settings(group) for group in optimizer.param_groups] != own:
        raise ValueError("its optimizer has other settings")
    for parameter, values in optimizer.state.items():
        found = {name: tuple(value.shape) for name, value in values.items()}
        shape = tuple(parameter.shape)
        if found != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"its optimizer has {found} for a parameter of shape {shape}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr")}  # the rate changes each step

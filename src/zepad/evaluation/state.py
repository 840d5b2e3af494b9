"""What an evaluation has found so far, on disk: one file per attacker and batch, written as it comes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..files import replacing, write_text
from ..schema import STRICT, parse_json, read_bounded
from .identity import digest
from .report import Cost

_RECORD = "evaluation.json"
_RECORD_BYTES = 1 << 16  # a record is well below one kilobyte


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What two evaluations must agree in for one to go on where the other stopped.

    Attributes:
        model_digest: SHA-256 of the model's weights, settings and benign predictions.
        weights_digest: `zepad.evaluation.weights_digest` of the model; None for a function.
        threshold: Detection threshold; None without a detector.
        data_digest: SHA-256 of all images and labels.
        attackers_digest: SHA-256 of the names, threat models and settings of the attackers.
        batches: Number of batches.
        seed: Seed of the attacks and the bootstrap.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    model_digest: str
    weights_digest: str | None
    threshold: float | None
    data_digest: str
    attackers_digest: str
    batches: int
    seed: int

    def differences(self, other: Fingerprint) -> list[str]:
        """Return the names of the fields that differ, sorted."""
        names = [field.name for field in dataclasses.fields(self)]
        return sorted(name for name in names if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True, kw_only=True)
class State:
    """The folder of one evaluation.

    Attributes:
        folder: Holds `evaluation.json`, which says what is evaluated, and one safetensors file per attacker and batch.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, fingerprint: Fingerprint, *, resume: bool) -> State:
        """Start a new state or resume an existing one.

        Args:
            folder: Folder, which is created if it does not exist.
            fingerprint: Identity of the evaluation.
            resume: Whether to resume an interrupted evaluation with the same fingerprint.

        Raises:
            InputError: If the folder holds an evaluation and `resume` is off, or cannot be written.
            CheckpointError: If it holds another evaluation, or a damaged record; the error names what differs.
        """
        file = folder / _RECORD
        held = _read_fingerprint(file)
        if held is not None and not resume:
            raise InputError(f"{folder} holds an evaluation already. Pass resume=True to go on, or another folder.")
        if held is not None and held != fingerprint:
            raise CheckpointError(
                f"the evaluation in {folder} was another; what differs: {', '.join(held.differences(fingerprint))}. "
                "Resume with what it was started with, or use another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if held is None:
                text = json.dumps(dataclasses.asdict(fingerprint), indent=1) + "\n"
                write_text(file, text)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}. Choose a writable folder.") from error
        return cls(folder=folder)

    def write(self, attacker: int, batch: int, tensors: dict[str, Tensor], cost: Cost) -> None:
        """Keep the attacked images of one batch, what the model said of them, and what they cost.

        Raises:
            InputError: If the folder cannot be written.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        paid = json.dumps([cost.seconds, cost.forwards, cost.gradients])
        metadata = {"cost": paid, "sha256": digest(held)}
        try:
            with replacing(self._file(attacker, batch)) as partial:
                save_file(held, partial, metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder} cannot be written: {error}. Free some space and resume.") from error

    def read(self, attacker: int, batch: int) -> tuple[dict[str, Tensor], Cost] | None:
        """Return what was kept of one batch, or None.

        Raises:
            CheckpointError: If the file is damaged.
        """
        file = self._file(attacker, batch)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                seconds, forwards, gradients = json.loads(opened.metadata()["cost"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
                if digest(tensors) != opened.metadata()["sha256"]:
                    raise ValueError("its tensors are not those that were written")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged: {error}. Delete it and resume; it is computed again.") from error
        return tensors, Cost(seconds=seconds, forwards=forwards, gradients=gradients)

    def _file(self, attacker: int, batch: int) -> Path:
        return self.folder / f"attacker-{attacker:02d}-batch-{batch:05d}.safetensors"


def _read_fingerprint(file: Path) -> Fingerprint | None:
    if not file.exists():
        return None
    try:
        return parse_json(Fingerprint, read_bounded(file, _RECORD_BYTES), origin=str(file))
    except CheckpointError as error:
        raise CheckpointError(f"{error} To start anew, use another folder.") from error

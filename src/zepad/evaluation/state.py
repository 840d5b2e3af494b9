"""What an evaluation has found so far, on disk: one file per attacker and batch, written as it comes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..files import write_bytes, write_text, writing
from ..schema import STRICT, parse_json, read_bounded
from ..sealed import read_sealed, seal
from .identity import digest
from .report import Cost

_T = TypeVar("_T")

_RECORD = "evaluation.json"
_RECORD_BYTES = 1 << 20  # a record has about 100 bytes for each attacker
_RECIPE = "attackers.json"
_FILES = "attacker-*-batch-*.safetensors"
_SHOWN = 3  # names of attackers that a message lists of each kind


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What two evaluations must agree in for one to go on where the other stopped.

    Attributes:
        model_digest: SHA-256 of the model's weights, settings and code.
        weights_digest: `zepad.evaluation.weights_digest` of the model; None for a function.
        threshold: Detection threshold; None without a detector.
        data_digest: SHA-256 of all images and labels.
        images: Number of images.
        batches: Number of batches.
        attackers: SHA-256 of the threat model and settings of each attacker by name, in their order; None where they
            are not known yet.
        predictions_digest: SHA-256 of what the model says of the benign images; None where it was not asked yet.
        seed: Seed of the attacks and the bootstrap.
        library_version: Version of zepad, whose attacks another version may have changed.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    model_digest: str
    weights_digest: str | None
    threshold: float | None
    data_digest: str
    images: int
    batches: int
    attackers: dict[str, str] | None
    predictions_digest: str | None
    seed: int
    library_version: str

    @property
    def attackers_digest(self) -> str:
        """SHA-256 of all attackers."""
        return digest(list((self.attackers or {}).items()))

    def differences(self, now: Fingerprint) -> list[str]:
        """Say what differs, causes alone: not what follows from them, and nothing that is not known `now`."""
        found = [
            f"{name} ({getattr(self, name)} then, {getattr(now, name)} now)"
            for name in ("library_version", "seed", "threshold")
            if getattr(self, name) != getattr(now, name)
        ]
        model = (self.model_digest, self.weights_digest) != (now.model_digest, now.weights_digest)
        found += ["the model (model_digest)"] if model else []
        for name in ("images", "batches"):  # with another number of either, all digests of the data are others too
            if getattr(self, name) != getattr(now, name):
                found.append(f"the number of {name} ({getattr(self, name)} then, {getattr(now, name)} now)")
                break
        else:
            if self.data_digest != now.data_digest:
                found.append("the images, their labels or their order (data_digest)")
            elif not model and now.predictions_digest not in (None, self.predictions_digest):
                found.append("what the model says of the same images (predictions_digest)")
        if now.attackers is not None:
            found += _other_attackers(self.attackers or {}, now.attackers)
        return found


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What the file of one attacker and batch belongs to: the digest of each."""

    __pydantic_config__: ClassVar[Any] = STRICT

    model: str
    attacker: str
    batch: str
    settings: str


_OTHERS = {
    "model": "another model",
    "attacker": "another attacker",
    "batch": "another batch",
    "settings": "other settings (data, threshold, seed or version)",
}


@dataclass(frozen=True, kw_only=True)
class _FileRecord:
    """What the file of one attacker and batch says of itself."""

    __pydantic_config__: ClassVar[Any] = STRICT

    sha256: str
    identity: _Identity
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Part:
    """One attacker on one batch.

    Attributes:
        attacker: Name of the attacker.
        number: Its place among the attackers.
        batch: Place of the batch in the data.
        images: Images of the batch `(N, C, H, W)`.
        digest: `zepad.evaluation.batches.digest_batch` of the batch.
    """

    attacker: str
    number: int
    batch: int
    images: Tensor
    digest: str


@dataclass(frozen=True, kw_only=True)
class State:
    """The folder of one evaluation.

    Attributes:
        folder: Holds `evaluation.json`, which says what is evaluated, and one safetensors file per attacker and batch.
        fingerprint: Identity of the evaluation, which every file carries.
    """

    folder: Path
    fingerprint: Fingerprint

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
        held = held_fingerprint(folder, resume=resume)
        if held is not None:
            refuse_another(folder, held, fingerprint)
        with writing(folder, InputError):
            folder.mkdir(parents=True, exist_ok=True)
            if held is None:
                text = json.dumps(dataclasses.asdict(fingerprint), indent=1) + "\n"
                write_text(folder / _RECORD, text)
        return cls(folder=folder, fingerprint=fingerprint)

    def write(self, part: Part, tensors: dict[str, Tensor], cost: Cost) -> None:
        """Keep the attacked images of one batch, what the model said of them, and what they cost.

        Raises:
            InputError: If the folder cannot be written.
        """
        record = {"identity": dataclasses.asdict(self._identity(part)), "cost": dataclasses.asdict(cost)}
        content = seal(tensors, record)
        try:
            write_bytes(self._file(part), content)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error}. Free some space and resume.") from error

    def read(self, part: Part, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cost] | None:
        """Return what was kept of one batch, or None.

        Args:
            part: The attacker and the batch.
            like: A tensor of the same dtype and rows for each one to be read, for any number of images: the last
                dimension of all but the images counts them.

        Raises:
            CheckpointError: If the file is damaged, or was made with another model, attacker, batch or other settings.
        """
        file = self._file(part)
        if not file.exists():
            return None
        try:
            content = read_sealed(file, limit=_limit(part.images))
            record = parse_json(_FileRecord, content.record, origin="its record")
        except CheckpointError as error:
            raise self.damaged(part, str(error)) from error
        if not content.is_sealed_by(record.sha256):
            raise self.damaged(part, "its bytes are not those that were written.")
        wanted = self._identity(part)
        others = [said for name, said in _OTHERS.items() if getattr(record.identity, name) != getattr(wanted, name)]
        if others:
            raise CheckpointError(
                f"{file} is of another evaluation: it was made with {', '.join(others)}. "
                "Delete it and resume; it is computed again."
            )
        expected = {name: _form(tensor, len(part.images)) for name, tensor in like.items()}
        expected["images"] = (part.images.dtype, tuple(part.images.shape))
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.tensors.items()} != expected:
            raise self.damaged(part, "its tensors have not the shapes of this batch and model.")
        return content.tensors, record.cost

    def damaged(self, part: Part, why: str) -> CheckpointError:
        """Return the error for a file that cannot be used."""
        return CheckpointError(f"{self._file(part)} is damaged: {why} Delete it and resume; it is computed again.")

    def _identity(self, part: Part) -> _Identity:
        fingerprint = self.fingerprint
        return _Identity(
            model=fingerprint.model_digest,
            attacker=(fingerprint.attackers or {})[part.attacker],
            batch=digest([part.batch, part.digest]),
            settings=digest(
                [
                    fingerprint.data_digest,
                    fingerprint.predictions_digest,
                    fingerprint.threshold,
                    fingerprint.seed,
                    fingerprint.library_version,
                ]
            ),
        )

    def _file(self, part: Part) -> Path:
        return self.folder / f"attacker-{part.number:02d}-batch-{part.batch:05d}.safetensors"


def held_fingerprint(folder: Path, *, resume: bool) -> Fingerprint | None:
    """Return the fingerprint of the evaluation that a folder holds, or None.

    Raises:
        InputError: If the folder holds an evaluation, or files of one, and `resume` is off.
        CheckpointError: If its record is damaged or missing.
    """
    held = _read(Fingerprint, folder / _RECORD) if resume else None
    if not resume and ((folder / _RECORD).exists() or any(folder.glob(_FILES))):
        raise InputError(f"{folder} holds an evaluation already. Pass resume=True to go on, or another folder.")
    if held is None and any(folder.glob(_FILES)):
        raise CheckpointError(
            f"{folder} holds files of an evaluation, but not {_RECORD}, which says of which. Use another folder."
        )
    return held


def check_recipe(folder: Path, recipe: Mapping[str, str]) -> None:
    """Keep what the attackers of an evaluation are made from, or refuse to go on with attackers made otherwise.

    It is known before they are made, which can take longer than the evaluation.

    Args:
        folder: Folder of the evaluation, which is created if it does not exist.
        recipe: Each thing that the attackers are made from, as a short text that differs where the thing differs.

    Raises:
        InputError: If the folder cannot be written.
        CheckpointError: If the folder holds an evaluation whose attackers were made otherwise, or a damaged record.
    """
    file = folder / _RECIPE
    started = held_fingerprint(folder, resume=True) is not None
    kept = _read(_Recipe, file) if started else None
    held = recipe if kept is None else kept.made_from
    names = [name for name in {**held, **recipe} if held.get(name) != recipe.get(name)]
    if names:
        told = ", ".join(f"{name} ({held.get(name)} then, {recipe.get(name)} now)" for name in names)
        raise _another(folder, told)
    with writing(folder, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"made_from": recipe}, indent=1) + "\n"
        write_text(file, text)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What the attackers of an evaluation are made from."""

    __pydantic_config__: ClassVar[Any] = STRICT

    made_from: dict[str, str]


def refuse_another(folder: Path, held: Fingerprint, now: Fingerprint) -> None:
    """Refuse to go on with another evaluation.

    Raises:
        CheckpointError: If the fingerprints differ in what both know; the error names it.
    """
    differences = held.differences(now)
    if differences:
        raise _another(folder, ", ".join(differences))


def _another(folder: Path, differences: str) -> CheckpointError:
    return CheckpointError(
        f"the evaluation in {folder} was another; what differs: {differences}. "
        "Resume with what it was started with, or use another folder."
    )


def _other_attackers(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say which attackers differ, a few by name."""
    changes = {
        "others": [name for name in then if name in now and then[name] != now[name]],
        "missing now": [name for name in then if name not in now],
        "new": [name for name in now if name not in then],
    }
    told = [
        f"{what}: {', '.join(names[:_SHOWN])}{' and more' if len(names) > _SHOWN else ''}"
        for what, names in changes.items()
        if names
    ]
    if not told and list(then) != list(now):
        told = ["in another order"]
    return [f"the attackers (attackers_digest; {'; '.join(told)})"] if told else []


def _form(tensor: Tensor, images: int) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, (*tensor.shape[:-1], images)


def _limit(images: Tensor) -> int:
    """Return more bytes than the file of one batch has: images, header, and 1 KiB of decisions for each image."""
    return images.numel() * images.element_size() + len(images) * 1024 + (1 << 20)


def _read(cls: type[_T], file: Path) -> _T | None:
    if not file.exists():
        return None
    try:
        return parse_json(cls, read_bounded(file, _RECORD_BYTES), origin=str(file))
    except CheckpointError as error:
        raise CheckpointError(f"{error} To start anew, or after an upgrade, use another folder.") from error

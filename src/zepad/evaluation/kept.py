"""Universal attacks that are fitted once: the perturbation is kept on disk, and found again by what made it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..arguments import checked
from ..attacks import UniversalPerturbation
from ..digests import digest_tensor
from ..errors import CheckpointError, InputError
from ..inputs import check_reiterable
from ..seeding import seeded
from ..types import Loader
from .identity import digest
from .suites import UniversalAttack

_MADE_BY = "made_by"  # field of the provenance, in the file alone, that says whose file it is


@checked
def keeping(attacks: Mapping[str, UniversalAttack], folder: str | Path) -> dict[str, UniversalAttack]:
    """Return universal attacks that keep their perturbations in a folder, and craft none that is there already.

    A perturbation is found by the SHA-256 of the attack with all its settings, the encoders with their weights, the
    images and labels in their order, and the version of the library. Images that change from pass to pass, as by a
    random transform, are those of a first pass under a fixed seed.

    Args:
        attacks: Universal attacks by name.
        folder: Folder of the perturbations, created when the first one is written.

    Returns:
        The attacks by the same names; `fit` raises `CheckpointError` if the file of a perturbation is damaged or that
        of another one, and `InputError` if the folder cannot be written.
    """
    known = _Digests()
    return {name: _Kept(attack=attack, folder=Path(folder), data=known) for name, attack in attacks.items()}


class _Digests:
    """Digests of the attacker's data, each computed once however many attacks are fitted to it."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor | Loader, str]] = []  # the data are held, so that no id is used twice

    def of(self, images: Tensor | Loader) -> str:
        """Return the SHA-256 of everything a pass over the data yields, in its order."""
        for data, known in self._known:
            if data is images:
                return known
        computed = digest_data(images)
        self._known.append((images, computed))
        return computed


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A universal attack whose perturbations are kept.

    Attributes:
        attack: The attack.
        folder: Folder of the perturbations.
        data: Digests of the data seen so far.
    """

    attack: UniversalAttack
    folder: Path
    data: _Digests

    def fit(self, encoder: Any, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Return the kept perturbation, or else craft and keep it."""
        if not isinstance(images, Tensor):
            check_reiterable(images)
        encoders = list(encoder) if isinstance(encoder, (list, tuple)) else [encoder]
        made_by = digest([self.attack, encoders, self.data.of(images), __version__])
        file = self.folder / f"{made_by}.safetensors"
        if not file.exists():
            perturbation = self.attack.fit(encoder, images, progress=progress)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{self.folder} cannot be written: {error.strerror}. Choose another folder."
                ) from error
            replace(perturbation, provenance={**perturbation.provenance, _MADE_BY: made_by}).save(file)
            return perturbation
        try:
            kept = UniversalPerturbation.load(file)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It was kept by an evaluation: delete the file to craft it again."
            ) from error
        if kept.provenance.get(_MADE_BY) != made_by:
            raise CheckpointError(
                f"{file} does not say that it was made by this attack, on these encoders and images. Delete the file "
                "to craft it again."
            )
        record = {name: value for name, value in kept.provenance.items() if name != _MADE_BY}
        return replace(kept, provenance=record)


def digest_data(images: Tensor | Loader) -> str:
    """Return the SHA-256 of everything that one pass over some data yields, in its order under a fixed seed.

    Args:
        images: Images `(N, C, H, W)`, or a loader of batches, which is left as found.
    """
    if isinstance(images, Tensor):
        return digest_tensor(images)
    generator = getattr(images, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    found = hashlib.sha256()
    with seeded(0):
        for batch in images:
            for part in batch if isinstance(batch, (tuple, list)) else (batch,):
                found.update((digest_tensor(part) if isinstance(part, Tensor) else repr(part)).encode())
    if state is not None:  # the order in which the attack reads the images is the one without this pass
        generator.set_state(state)  # type: ignore[union-attr]
    return found.hexdigest()

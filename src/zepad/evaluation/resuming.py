"""Whether an evaluation can go on where another stopped, asked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .._version import __version__
from ..types import Branched, ImageModel, Loader
from .attackers import Attacker
from .batches import checked_batches, digest_batch, digest_batches
from .identity import digest, weights_digest
from .predictions import Benign
from .state import Fingerprint, held_fingerprint, refuse_another


def check_resumable(
    folder: Path,
    model: ImageModel,
    loader: Loader,
    attackers: Sequence[Attacker] | None = None,
    *,
    seed: int,
    resume: bool = True,
) -> None:
    """Refuse to go on with another evaluation. Neither the model nor an attacker is run.

    Args:
        folder: Folder of the evaluation; where it holds none, nothing else is read.
        model: The model to be evaluated.
        loader: Yields `(images, labels)`.
        attackers: The attackers; None where they are not made yet.
        seed: Seed of the evaluation.
        resume: Whether to go on with what the folder holds.

    Raises:
        InputError: If a batch does not fit, or the folder holds an evaluation and `resume` is off.
        CheckpointError: If the folder holds another evaluation; the error names what differs.
    """
    held = held_fingerprint(folder, resume=resume)
    if held is None:
        return
    digests, images = [], 0
    for batch, labels in checked_batches(loader, None):
        digests.append(digest_batch(batch, labels))
        images += len(labels)
    refuse_another(folder, held, fingerprint_of(model, digests, images, attackers, seed=seed))


def fingerprint_of(
    model: ImageModel,
    digests: Sequence[str],
    images: int,
    attackers: Sequence[Attacker] | None,
    *,
    seed: int,
    benign: Benign | None = None,
) -> Fingerprint:
    """Return the identity of an evaluation.

    Args:
        model: The model to be evaluated.
        digests: `digest_batch` of every batch.
        images: Number of images.
        attackers: The attackers; None where they are not made yet.
        seed: Seed of the evaluation.
        benign: Predictions for the benign images; None where the model was not asked yet.
    """
    said = None
    if benign is not None:  # a function may depend on more than its code tells, so its confidences count too
        said = benign.predictions.predictions if isinstance(model, nn.Module) else benign.predictions.tensors()
    return Fingerprint(
        model_digest=digest([model]),
        weights_digest=weights_digest(model) if isinstance(model, nn.Module) else None,
        threshold=model.threshold if isinstance(model, Branched) else None,
        data_digest=digest_batches(digests),
        images=images,
        batches=len(digests),
        attackers=None if attackers is None else {a.name: digest([a.threat_model, a.settings]) for a in attackers},
        predictions_digest=None if said is None else digest([said]),
        seed=seed,
        library_version=__version__,
    )

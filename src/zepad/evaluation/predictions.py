"""Predictions of a model for images, and for the benign images before any attack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..encoders.once import passing_once
from ..errors import InputError
from ..functional.precision import accurate
from ..inputs import check_labels
from ..types import Branched, ImageModel, Loader
from .batches import checked_batches, digest_batch

_ROUNDING = 1e-5  # by which a softmax may exceed one


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of a model for some images: one row per branch, and the fused decision in the last row.

    Attributes:
        predictions: Predicted classes, int64 `(B + 1, N)`.
        confidences: Largest softmax probabilities, float32 `(B + 1, N)`.
        scores: Detection scores, float32 `(N,)`; None where the model has no detector with a threshold.
    """

    predictions: Tensor
    confidences: Tensor
    scores: Tensor | None

    @property
    def fused(self) -> Tensor:
        """Predicted classes of the whole model, int64 `(N,)`."""
        return self.predictions[-1]

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several batches as those of one."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            predictions=torch.cat([part.predictions for part in parts], dim=1),
            confidences=torch.cat([part.confidences for part in parts], dim=1),
            scores=torch.cat(scores) if scores else None,
        )

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Predictions:
        """Return the predictions that `tensors` gave.

        Raises:
            InputError: If their values are none that a model gives.
        """
        found = cls(
            predictions=tensors["predictions"], confidences=tensors["confidences"], scores=tensors.get("scores")
        )
        sure = found.confidences
        if bool((found.predictions < 0).any()) or not bool(((sure >= 0) & (sure <= 1 + _ROUNDING)).all()):
            raise InputError("classes must not be negative, and confidences must lie in [0, 1].")
        if found.scores is not None and bool(found.scores.isnan().any()):
            raise InputError("detection scores must not be NaN.")
        return found

    def of(self, images: Tensor) -> Predictions:
        """Return the predictions for some of the images, bool `(N,)`."""
        scores = None if self.scores is None else self.scores[images]
        return Predictions(
            predictions=self.predictions[:, images], confidences=self.confidences[:, images], scores=scores
        )

    def replaced(self, images: Tensor, by: Predictions) -> Predictions:
        """Return the predictions with others for some of the images, bool `(N,)`."""
        named = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for name, tensor in by.tensors().items():
            named[name][..., images] = tensor
        return Predictions(
            predictions=named["predictions"], confidences=named["confidences"], scores=named.get("scores")
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without scores where there are none."""
        named = {"predictions": self.predictions, "confidences": self.confidences}
        return named if self.scores is None else {**named, "scores": self.scores}


@dataclass(frozen=True, kw_only=True)
class Benign:
    """Predictions of a model for the benign images, with which every attack is compared.

    Attributes:
        predictions: Predictions of all images.
        labels: True classes, int64 `(N,)`, on the CPU.
        digests: One text per batch that identifies its images and labels.
        branch_names: Names of the branches, in the order of the rows; empty for a plain classifier.
        threshold: Detection threshold; None where the model has no detector.
    """

    predictions: Predictions
    labels: Tensor
    digests: tuple[str, ...]
    branch_names: tuple[str, ...]
    threshold: float | None

    @property
    def right(self) -> Tensor:
        """Which images the whole model classifies right, bool `(N,)`."""
        return self.predictions.fused == self.labels


def predict_benign(model: ImageModel, loader: Loader) -> Benign:
    """Ask a model once for every image of a loader.

    Args:
        model: Images to logits `(N, K)`.
        loader: Yields `(images, labels)`.

    Raises:
        InputError: If the loader is empty, a batch does not fit, a label exceeds the classes, a logit is NaN, or no
            image is classified right.
    """
    digests, predictions, labels = [], [], []
    for images, targets in checked_batches(loader, device_of(model)):
        digests.append(digest_batch(images, targets))
        with passing_once(model):
            logits = stacked_logits(model, images)
            check_labels(targets, count=len(images), num_classes=logits.shape[-1])
            predictions.append(_decide(model, images, logits))
        labels.append(targets.cpu())
    if not labels:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
    branched = model if isinstance(model, Branched) else None
    benign = Benign(
        predictions=Predictions.join(predictions),
        labels=torch.cat(labels),
        digests=tuple(digests),
        branch_names=branched.branch_names if branched else (),
        threshold=branched.threshold if branched else None,
    )
    if not bool(benign.right.any()):
        raise InputError(
            f"none of the {len(benign.labels)} images is classified right, so no attack can be measured. "
            "Check the labels, and that the model is the one trained for them."
        )
    return benign


def right_images(model: ImageModel, loader: Loader, benign: Benign, *, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first images that a model classifies right, and their labels.

    Args:
        model: Images to logits `(N, K)`.
        loader: Yields `(images, labels)`, as for `predict_benign`.
        benign: The result of `predict_benign`.
        limit: Number of images at most.
    """
    found: list[tuple[Tensor, Tensor]] = []
    position = 0
    for images, labels in checked_batches(loader, device_of(model)):
        right = benign.right[position : position + len(labels)].to(labels.device)
        position += len(labels)
        found.append((images[right], labels[right]))
        if sum(len(targets) for _, targets in found) >= limit:
            break
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return images[:limit], labels[:limit]


def predict(model: ImageModel, images: Tensor) -> Predictions:
    """Ask a model once, without gradients.

    Args:
        model: Images to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].

    Raises:
        InputError: If the model gives no logits, or a logit is NaN.
    """
    with passing_once(model):
        return _decide(model, images, stacked_logits(model, images))


def stacked_logits(model: ImageModel, images: Tensor) -> Tensor:
    """Return the logits of every branch and the fused ones in the last row, `(B + 1, N, K)`, without gradients.

    Raises:
        InputError: If the model gives no logits.
    """
    with torch.no_grad():
        if isinstance(model, Branched):
            branches = model.branch_logits(images)
            rows = torch.cat([branches, model.fuse(branches)[None]])
        else:
            rows = model(images)[None]
    if rows.ndim != 3 or rows.shape[1] != len(images):
        raise InputError(
            f"the model must map images to logits of shape ({len(images)}, K); got {tuple(rows.shape[1:])}. "
            "Evaluate a classifier: put a head on a bare encoder."
        )
    return accurate(rows)


def _decide(model: ImageModel, images: Tensor, logits: Tensor) -> Predictions:
    confidences = logits.softmax(dim=-1).amax(dim=-1).float()
    if bool(confidences.isnan().any()):
        raise InputError("the model's logits hold NaN or infinity, so its decisions mean nothing. Mend the model.")
    scores = None
    if isinstance(model, Branched) and model.threshold is not None:
        with torch.no_grad():
            scores = model.score(images).float().cpu()
    predictions = logits.argmax(dim=-1)  # a softmax would round close logits to a tie
    return Predictions(predictions=predictions.cpu(), confidences=confidences.cpu(), scores=scores)


def device_of(model: ImageModel) -> torch.device | None:
    """Return the device of a module's parameters; None where there is none."""
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None


@contextmanager
def random_state_kept(model: ImageModel) -> Iterator[None]:
    """Put the global random state back: a loader draws from it whenever it is iterated, and a random model too."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        yield

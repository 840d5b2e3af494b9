"""What a training objective is given and returns, and what a hardening method adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..modules import Branch
from ..types import ImageModel, LossFn


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        images: Clean images `(N, C, H, W)` in [0, 1].
        adversarial: The same images attacked; the clean images themselves where training is benign.
        labels: int64 `(N,)`.
        targets: What the inner attack moved away from: the labels, logits `(N, K)` or features `(N, D)`.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor | None = None


class Outcome(NamedTuple):
    """What one evaluation of an objective gives.

    Attributes:
        loss: The scalar to minimise.
        adversarial_logits: `(N, K)`, for the progress bar; None where the objective has none.
        benign_logits: `(N, K)`, for the progress bar; None where the objective has none.
    """

    loss: Tensor
    adversarial_logits: Tensor | None = None
    benign_logits: Tensor | None = None


Objective = Callable[[Branch, Batch], Outcome]
"""What is minimised: a branch and a batch to a loss."""

Targets = Callable[[Branch, Tensor, Tensor], Tensor]
"""The targets of the inner attack for a branch, clean images and labels."""


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image `(N,)`, the inner loss of most methods."""
    return F.cross_entropy(logits, labels, reduction="none")


def whole(branch: Branch) -> ImageModel:
    """Attack the logits of the branch."""
    return branch


def labels_as_targets(_: Branch) -> Targets:
    """Attack the labels."""
    return lambda branch, images, labels: labels  # noqa: ARG005 - the signature of all targets


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner maximisation: `max loss(model(x + delta), targets)`, by the PGD of the config.

    Attributes:
        loss: One value per image.
        model: The part of the branch that is attacked.
        targets: Called once with the branch as it is before training, so that a method can keep what it needs of it;
            gives the function that computes the targets of each batch.
    """

    loss: LossFn = label_loss
    model: Callable[[Branch], ImageModel] = whole
    targets: Callable[[Branch], Targets] = labels_as_targets


CROSS_ENTROPY = Inner()
"""Most methods attack the labels through the whole branch."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A second stage on clean data: chosen layers are trained with cross-entropy, everything else stays bit for bit.

    Attributes:
        choose: The modules to train, named as in `branch.named_modules()`, given the hardened branch and adversarial
            batches.
        images: How many images, at least, are attacked for `choose`.
        lr: Peak learning rate, of encoder and head layers alike.
        epochs: Passes; None takes as many as benign training does.
    """

    choose: Callable[[Branch, Sequence[Batch]], Sequence[str]]
    images: int
    lr: float
    epochs: int | None


@dataclass(frozen=True, kw_only=True)
class HardeningMethod:
    """A way of hardening one encoder: an outer and an inner problem, and what follows them.

    Attributes:
        name: Of the method with its settings, such as `"trades(beta=6)"`. A run resumes under the same name alone.
        objective: The outer minimisation.
        inner: The inner maximisation.
        trains_head: False leaves labels and head out of the training; a head is fitted on clean features afterwards.
        adaptation: The second stage, where there is one.
    """

    name: str
    objective: Objective
    inner: Inner = CROSS_ENTROPY
    trains_head: bool = True
    adaptation: Adaptation | None = None

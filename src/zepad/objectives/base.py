"""What a training objective is given and returns, and the recipe that is built around it."""

from __future__ import annotations

import math
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
        labels: Labels, int64 `(N,)`.
        targets: What the inner attack moved away from: the labels, logits `(N, K)` or features `(N, D)`.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor | None = None


class ObjectiveOutput(NamedTuple):
    """The value of an objective on one batch.

    Attributes:
        loss: The scalar to minimise.
        adversarial_logits: Detached logits `(N, K)` of the adversarial images, for the training accuracy in the
            progress bar and the history; None where the objective computes none.
        benign_logits: Detached logits `(N, K)` of the clean images, for the same; None where the objective computes
            none.
    """

    loss: Tensor
    adversarial_logits: Tensor | None = None
    benign_logits: Tensor | None = None


Objective = Callable[[Branch, Batch], ObjectiveOutput]
"""What training minimises: a map from a branch and a batch to a loss."""

Targets = Callable[[Branch, Tensor, Tensor], Tensor]
"""A map from a branch, clean images and labels to the targets of the inner attack."""


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image `(N,)`, the inner loss of most recipes."""
    return F.cross_entropy(logits, labels, reduction="none")


def whole(branch: Branch) -> ImageModel:
    """Return the branch itself, so that the inner attack sees its logits."""
    return branch


def labels_as_targets(_: Branch) -> Targets:
    """Return the function whose targets are the labels."""
    return lambda branch, images, labels: labels  # noqa: ARG005 - the signature of all targets


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner maximisation, `max loss(model(x + delta), targets)`, by a PGD whose budget and steps the config holds.

    Attributes:
        loss: Function from outputs and targets to one loss per image `(N,)`.
        model: Function from a branch to the part of it that is attacked.
        targets: Function that is called once with the branch as it is before training, so that a recipe can keep what
            it needs of it, and returns the function that computes the targets of each batch.
    """

    loss: LossFn = label_loss
    model: Callable[[Branch], ImageModel] = whole
    targets: Callable[[Branch], Targets] = labels_as_targets


CROSS_ENTROPY = Inner()
"""The inner maximisation of most recipes: cross-entropy with the labels, through the whole branch."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A second stage on clean images: chosen layers are trained with cross-entropy, all others stay bit for bit.

    Attributes:
        choose: Function from the hardened branch and adversarial batches to the names of the modules to train, as in
            `branch.named_modules()`.
        images: Smallest number of images that are attacked for `choose`.
        lr: Peak learning rate of encoder and head layers alike.
        epochs: Number of passes; None takes as many as benign training does.
    """

    choose: Callable[[Branch, Sequence[Batch]], Sequence[str]]
    images: int
    lr: float
    epochs: int | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one branch is trained: what is minimised, against which attack, and for how long by default.

    Rates, length, seed and the budget of the attack are settings of `HardenConfig` and `BenignConfig`, the same for
    every recipe.

    Attributes:
        name: Name of the recipe with its settings, such as `"trades(beta=6)"`. A run resumes under the same name only.
        objective: The outer minimisation.
        inner: The inner maximisation; None trains on clean images.
        trained: Modules that are trained, as named in `branch.named_modules()`. All others stay as they are, in
            evaluation mode, BatchNorm statistics included. Without `"head"` a fresh head is fitted on clean features
            afterwards.
        choose_epoch: Whether the epoch with the best validation accuracy is kept. False keeps the last one and
            validates nothing.
        min_updates: Number of updates that `epochs=None` provides for.
        min_epochs: Smallest number of passes that `epochs=None` makes.
        adaptation: The second stage; None for recipes that have one stage.
    """

    name: str
    objective: Objective
    inner: Inner | None = CROSS_ENTROPY
    trained: tuple[str, ...] = ("encoder", "head")
    choose_epoch: bool = True
    min_updates: int = 900
    min_epochs: int = 10
    adaptation: Adaptation | None = None

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained along with the encoder, which takes labels."""
        return "head" in self.trained

    def epochs(self, configured: int | None, batches: int | None) -> int:
        """Return the number of passes over the data.

        Rates and schedules are measured in updates, and a small data set has few of them in a pass.

        Args:
            configured: Number of passes that the config asks for; None leaves it open.
            batches: Number of batches in a pass; None where the loader does not know.

        Returns:
            `configured`, or else enough passes for `min_updates`, at least `min_epochs`.
        """
        if configured is not None:
            return configured
        return max(self.min_epochs, math.ceil(self.min_updates / batches) if batches else 0)

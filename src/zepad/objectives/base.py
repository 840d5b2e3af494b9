"""What a training objective is given and returns, and the recipe that is built around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_fields
from ..config import Schedule, check_budget, is_integer, require
from ..modules import Branch
from ..types import ImageModel, LossFn
from .augmentation import Augmentation
from .mixture import DAEMixture


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        images: Clean images `(N, C, H, W)` in [0, 1].
        adversarial: Attacked images `(N, C, H, W)`; the clean images themselves where training is benign.
        labels: Labels, int64 `(N,)`.
        targets: What the inner attack moved away from: the labels, logits `(N, K)` or features `(N, D)`.
        static: Adversarial examples of public encoders `(N, C, H, W)` for the same images, where the recipe has a
            `DAEMixture`.
        public_features: Features `(N, D)` that the encoder gave the clean images before training, where the recipe
            needs them.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor | None = None
    static: Tensor | None = None
    public_features: Tensor | None = None


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


def check_own(own_eps: float | None, own_steps: int) -> None:
    """Check the settings of the attack on the encoder in training.

    Raises:
        ConfigError: If one is out of range.
    """
    if own_eps is not None:
        check_budget(own_eps)
    require(is_integer(own_steps) and own_steps >= 1, "own_steps", own_steps, "an integer of at least 1")


def squared_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Return the squared L2 distance of each image's features `(N,)`, summed over features."""
    return (features - targets).square().sum(dim=1)


def encoder_of(branch: Branch) -> ImageModel:
    """Return the encoder of a branch, so that the inner attack sees its features."""
    return branch.encoder


def public_features(untrained: Branch) -> Targets:
    """Return the function whose targets are the features of the encoder as it is now, whatever becomes of it."""
    original = copy.deepcopy(untrained.encoder).eval().requires_grad_(False)

    def targets(branch: Branch, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 - unsupervised
        with torch.no_grad():
            features: Tensor = original(images)
        return features.float()

    return targets


def labels_as_targets(_: Branch) -> Targets:
    """Return the function whose targets are the labels."""
    return lambda branch, images, labels: labels  # noqa: ARG005 - the signature of all targets


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner maximisation, `max loss(model(x + delta), targets)`, by PGD.

    Attributes:
        loss: Function from outputs and targets to one loss per image `(N,)`.
        model: Function from a branch to the part of it that is attacked.
        targets: Function that is called once with the branch as it is before training, so that a recipe can keep what
            it needs of it, and returns the function that computes the targets of each batch.
        eps: Radius of the attack in [0, 1] pixel units; None takes that of the config.
        steps: Number of steps of the attack where the config states none.
    """

    loss: LossFn = label_loss
    model: Callable[[Branch], ImageModel] = whole
    targets: Callable[[Branch], Targets] = labels_as_targets
    eps: float | None = None
    steps: int = 5

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ConfigError: If a field is of another type.
        """
        check_fields(self)


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
class Rates:
    """The learning rates that a recipe takes where the config leaves them open.

    Attributes:
        lr: Peak learning rate of the encoder (Adam).
        head_lr: Peak learning rate of the head.
        weight_decay: L2 penalty inside Adam.
        schedule: Course of the learning rates over the run, as in `HardenConfig`.
    """

    lr: float = 2e-3
    head_lr: float = 2e-3
    weight_decay: float = 8e-4
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ConfigError: If a field is of another type.
        """
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one branch is trained: what is minimised, against which attack, and at which rates and length by default.

    Seed and budget of the attack are settings of `HardenConfig` and `BenignConfig`, the same for every recipe. Rates,
    length and steps of the attack that these state replace those of the recipe.

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
        rates: Learning rates where the config states none.
        static: Adversarial examples of the public encoders that each batch carries in `Batch.static`; None for recipes
            that do without.
        needs_public_features: Whether each batch carries the features that the encoder gave its clean images before
            training, `Batch.public_features`.
        augmentation: Random change of the training images, the same for an image and its static adversarial example,
            before everything else; None leaves them as they are.
    """

    name: str
    objective: Objective
    inner: Inner | None = CROSS_ENTROPY
    trained: tuple[str, ...] = ("encoder", "head")
    choose_epoch: bool = True
    min_updates: int = 900
    min_epochs: int = 10
    adaptation: Adaptation | None = None
    rates: Rates = Rates()
    static: DAEMixture | None = None
    needs_public_features: bool = False
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ConfigError: If a field is of another type.
        """
        check_fields(self)

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

"""Attacks on an ensemble by an attacker who knows its branches and its detector.

The plainest adaptive attack needs nothing from here: any attack on the ensemble itself, which maps images to fused
logits, differentiates through the fusion. This module adds one attack on all branches at once and one that also evades
the detector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..config import require
from ..encoders.once import passing_once
from ..errors import InputError
from ..functional import hardened_log_probabilities
from ..functional.precision import accurate
from ..inputs import check_images, check_labels
from ..modes import evaluating
from ..types import ImageModel, LossFn
from .ascent import ascend, check_ascent
from .base import likeliest_wrong, strongest
from .losses import margin
from .surrogates import BranchLogits


@dataclass(frozen=True, kw_only=True)
class JointAPGD:
    """Move the hardened branches and the benign branch towards the same wrong class, with the steps of `APGD`.

    Fusion rules that bound the vote of the benign branch hide its gradient, because a vote of probability one has no
    gradient. This attack sums a loss over the branches instead, for one wrong class after another: for target class `t`
    and label `y` it maximises `log p_H(t) - log p_H(y) + min(z_B(t) - z_B(y), cap)`, with the mean probability `p_H` of
    the hardened branches and the logits `z_B` of the benign branch. Beyond a lead of `cap` in the benign logits, the
    rest of the budget is spent on the hardened branches. An image counts as won when the fused decision is wrong. For
    any other image the result is the candidate with the largest margin of the fused logits.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        branch_logits: Map from images to stacked logits `(B, N, K)`, hardened branches first, such as
            `defense.branch_logits`.
        fuse: Map from stacked logits `(B, N, K)` to fused logits `(N, K)`, such as `defense.fuse`.
        steps: Number of gradient steps for each target class.
        classes: Number of target classes, taken by the largest wrong probabilities of the hardened branches; at most
            all wrong classes are tried.
        cap: Lead of the target class in the benign logits beyond which the loss no longer grows, positive.
        norm: Norm of the ball, `"linf"` or `"l2"`.

    References:
        Tramer, Carlini, Brendel, Madry, On Adaptive Attacks to Adversarial Example Defenses, NeurIPS 2020, arXiv
        2002.08347 (a loss that is consistent with the goal, in place of one that the defense hides).
    """

    eps: float
    branch_logits: BranchLogits
    fuse: Callable[[Tensor], Tensor]
    steps: int = 100
    classes: int = 3
    cap: float = 5.0
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        check_ascent(self.eps, self.norm, self.steps, 1)
        require(self.classes >= 1, "classes", self.classes, "at least 1")
        require(self.cap > 0, "cap", self.cap, "a positive number")

    @checked
    def __call__(
        self,
        model: ImageModel,
        images: Tensor,
        targets: Tensor,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Model to which the branches belong. It is only put in evaluation mode and not called.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit the images.
        """
        check_images(images)
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(aim: Tensor, left: Tensor) -> Tensor:
            return self._aim(images[left], labels[left], aim[left], generator)

        def fused(points: Tensor) -> Tensor:
            return self.fuse(accurate(self.branch_logits(points)))

        with evaluating(model), evaluating(getattr(self.branch_logits, "__self__", None)):
            with torch.no_grad():
                logits = accurate(self.branch_logits(images))
            aims = likeliest_wrong(hardened_log_probabilities(logits), labels, self.classes)
            return strongest(fused, images, labels, self.fuse(logits), [partial(attempt, aim) for aim in aims])

    def _aim(self, images: Tensor, labels: Tensor, aim: Tensor, generator: Generator | None) -> Tensor:
        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = accurate(self.branch_logits(points))
            pair = torch.stack([aim[rows], labels[rows]], dim=1)
            hardened, benign = (
                outputs.gather(1, pair) @ outputs.new_tensor([1.0, -1.0])
                for outputs in (hardened_log_probabilities(logits), logits[-1])
            )
            return hardened + benign.clamp_max(self.cap), self.fuse(logits).argmax(dim=1) != labels[rows]

        return ascend(evaluate, images, eps=self.eps, norm=self.norm, steps=self.steps, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DetectorEvading:
    """Change the decision and keep the detection score below the threshold, with the steps of `APGD`.

    The attack maximises `loss_fn(model(x), y) - weight * max(0, score(x) - threshold)`. An image counts as won when it
    is misclassified and its score does not exceed the threshold; it is then no longer passed to the model. For any
    other image the result is the point with the largest value of that sum.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        score: Differentiable map from images to scores `(N,)`, larger where an image is more suspicious, such as
            `defense.score`.
        threshold: Score above which an image is flagged.
        weight: Weight of the excess of the score over the threshold, zero or more.
        steps: Number of gradient steps of each restart.
        restarts: Number of random starts, each for the images that are not yet won.
        norm: Norm of the ball, `"linf"` or `"l2"`.
        loss_fn: Loss of the decision: `margin`, `cross_entropy`, `dlr` or any function with their signature.

    References:
        Carlini, Wagner, Adversarial Examples Are Not Easily Detected: Bypassing Ten Detection Methods, AISec 2017,
        arXiv 1705.07263 (a detector's loss beside the classifier's).
    """

    eps: float
    score: Callable[[Tensor], Tensor]
    threshold: float
    weight: float = 1.0
    steps: int = 100
    restarts: int = 1
    norm: str = "linf"
    loss_fn: LossFn = margin

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        check_ascent(self.eps, self.norm, self.steps, self.restarts)
        require(self.threshold == self.threshold, "threshold", self.threshold, "a number")
        require(0 <= self.weight < float("inf"), "weight", self.weight, "a number of zero or more")

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)`: the ensemble with its fused logits, or a surrogate.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit the images, or the score is not `(N,)` or not differentiable.
        """
        check_images(images)
        labels = check_labels(targets, count=len(images))

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            with passing_once(model):
                outputs, scores = accurate(model(points)), accurate(self.score(points))
            _check_scores(scores, points)
            excess = (scores - self.threshold).clamp_min(0)
            loss = self.loss_fn(outputs, labels[rows]) - self.weight * excess
            return loss, (outputs.argmax(dim=1) != labels[rows]) & (scores <= self.threshold)

        with evaluating(model), evaluating(self.score):
            return ascend(
                evaluate,
                images,
                eps=self.eps,
                norm=self.norm,
                steps=self.steps,
                restarts=self.restarts,
                generator=generator,
            )


def _check_scores(scores: Tensor, images: Tensor) -> None:
    if scores.shape != images.shape[:1]:
        raise InputError(f"score must return shape ({len(images)},), one per image; got {tuple(scores.shape)}.")
    if images.requires_grad and not scores.requires_grad:
        raise InputError(
            "score must be differentiable with respect to the images; it returned a tensor without a gradient. "
            "Use defense.score instead of defense.detection_score."
        )

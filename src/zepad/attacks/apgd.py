"""Auto-PGD (APGD), untargeted and targeted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..config import require
from ..functional.precision import accurate
from ..inputs import check_images, check_labels
from ..modes import evaluating
from ..types import ImageModel, LossFn
from .ascent import ascend, check_ascent
from .base import likeliest_wrong, strongest
from .losses import cross_entropy, targeted_dlr


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD, an untargeted attack on a classifier that needs no step size.

    The step size starts at `2 * eps`. At fixed checkpoints, if too few steps raised the loss or no better point was
    found, the step size is halved and the search continues from the best point so far. Images that are already
    misclassified are returned unchanged, and an image is no longer passed to the model once it is misclassified. For
    any other image the result is the point with the largest loss, where the clean image is one of the candidates.

    APGD-CE is `APGD(loss_fn=cross_entropy)`, APGD-DLR is `APGD(loss_fn=dlr)`.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        steps: Number of gradient steps of each restart.
        restarts: Number of random starts, each for the images that are still classified correctly.
        norm: Norm of the ball, `"linf"` or `"l2"`.
        loss_fn: Loss to maximise: `cross_entropy`, `dlr`, `margin` or any function with their signature.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
        >>> attacked = APGD(eps=8 / 255, steps=5)(model, images, labels)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, algorithm 1.
    """

    eps: float
    steps: int = 100
    restarts: int = 1
    norm: str = "linf"
    loss_fn: LossFn = cross_entropy

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        check_ascent(self.eps, self.norm, self.steps, self.restarts)

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)`.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit the images, or the loss needs more classes.
        """
        check_images(images)
        labels = check_labels(targets, count=len(images))

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs = accurate(model(points))
            return self.loss_fn(outputs, labels[rows]), outputs.argmax(dim=1) != labels[rows]

        with evaluating(model):
            return ascend(
                evaluate,
                images,
                eps=self.eps,
                norm=self.norm,
                steps=self.steps,
                restarts=self.restarts,
                generator=generator,
            )


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD:
    """Auto-PGD with the targeted difference of logits ratio, towards one wrong class after another (APGD-T).

    The target classes of an image are its likeliest wrong classes. Images that are already misclassified are returned
    unchanged, and an image is no longer passed to the model once it is misclassified. For any other image the result is
    the point with the largest margin, where the clean image is one of the candidates.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units.
        steps: Number of gradient steps for each target class.
        classes: Number of target classes, taken by the largest wrong logits of the clean image; at most all wrong
            classes are tried.
        norm: Norm of the ball, `"linf"` or `"l2"`.

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, section 5.
    """

    eps: float
    steps: int = 100
    classes: int = 9
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        check_ascent(self.eps, self.norm, self.steps, 1)
        require(self.classes >= 1, "classes", self.classes, "at least 1")

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)` of at least four classes.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit the images, or there are fewer than four classes.
        """
        check_images(images)
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(aim: Tensor, left: Tensor) -> Tensor:
            return self._aim(model, images[left], labels[left], aim[left], generator)

        with evaluating(model):
            with torch.no_grad():
                outputs = accurate(model(images))
            aims = likeliest_wrong(outputs, labels, self.classes)
            return strongest(model, images, labels, outputs, [partial(attempt, aim) for aim in aims])

    def _aim(
        self, model: ImageModel, images: Tensor, labels: Tensor, aim: Tensor, generator: Generator | None
    ) -> Tensor:
        pairs = torch.stack([labels, aim], dim=1)

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs = accurate(model(points))
            return targeted_dlr(outputs, pairs[rows]), outputs.argmax(dim=1) != labels[rows]

        return ascend(evaluate, images, eps=self.eps, norm=self.norm, steps=self.steps, generator=generator)

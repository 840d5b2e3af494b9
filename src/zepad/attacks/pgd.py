"""Projected gradient descent: one loop, the norm and the objective as hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..config import check_budget, require
from ..functional.projection import BALLS, project_pixels
from ..modules import evaluating
from ..types import ImageModel

AttackObjective = Callable[[Tensor, Tensor], Tensor]
"""Maps model outputs and targets to one loss per image `(N,)`, which the attack maximises."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image, logits `(N, K)` and labels `(N,)` to `(N,)`."""
    return F.cross_entropy(outputs, targets, reduction="none")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the best wrong logit less the right one for each image `(N,)`: positive where the attack has won."""
    right = outputs.gather(1, targets[:, None]).squeeze(1)
    wrong = outputs.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    return wrong - right


def cosine_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one minus the cosine of features and target features for each image, both `(N, D)`."""
    return 1 - F.cosine_similarity(outputs, targets, dim=1)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent, an untargeted attack inside a norm ball around each image.

    Gradients are taken with respect to the input alone: parameters, their `.grad`, buffers and training flags are
    left as found. The model is attacked in evaluation mode.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        steps: Number of gradient steps.
        step_size: Length of one step; None takes `2.5 * eps / steps`.
        norm: `"linf"` or `"l2"`.
        random_start: Start at a random point of the ball instead of at the image.
        objective: What the attack maximises: `cross_entropy`, `margin`, `cosine_distance` or any function like them.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
        >>> attacked = PGD(eps=8 / 255, steps=3)(model, images, labels)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083.
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    random_start: bool = True
    objective: AttackObjective = cross_entropy

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        require(self.norm in BALLS, "norm", self.norm, f"one of {sorted(BALLS)}")
        check_budget(self.eps, self.norm)
        require(self.steps >= 0, "steps", self.steps, "zero or more")
        require(self.step_size is None or self.step_size > 0, "step_size", self.step_size, "positive, or None")

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Any map from images to what the objective understands.
            images: `(N, C, H, W)` in [0, 1].
            targets: Labels `(N,)`, or features `(N, D)` for a feature objective.
            generator: Of the random start, on the device of the images; None uses torch's own.

        Returns:
            Attacked images in the ball and in [0, 1], detached.
        """
        ball = BALLS[self.norm]
        step_size = self.step_size or 2.5 * self.eps / max(self.steps, 1)
        images = images.detach()
        delta = ball.random(images, self.eps, generator) if self.random_start else torch.zeros_like(images)
        delta = project_pixels(images, delta)
        with evaluating(model), torch.enable_grad():
            for _ in range(self.steps):
                delta.requires_grad_()
                loss = self.objective(model(images + delta).float(), targets).sum()
                (gradient,) = torch.autograd.grad(loss, delta)
                delta = ball.project(delta.detach() + step_size * ball.steepest(gradient), self.eps)
                delta = project_pixels(images, delta)
        return (images + delta).detach().clamp(0, 1)


def attack_features(attack: PGD, encoder: ImageModel, images: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Craft per-image downstream-agnostic adversarial examples: push features away from where they were.

    No label and no head is needed, so the result harms whatever is built on the encoder.

    Args:
        attack: Budget, norm and steps; its objective becomes `cosine_distance` and its start random.
        encoder: Images to features `(N, D)`.
        images: `(N, C, H, W)` in [0, 1].
        generator: As in `PGD`.

    Returns:
        Attacked images in the ball and in [0, 1], detached.
    """
    with evaluating(encoder), torch.no_grad():
        features = encoder(images).float()
    feature_attack = replace(attack, objective=cosine_distance, random_start=True)  # the gradient is zero at the image
    return feature_attack(encoder, images, features, generator=generator)

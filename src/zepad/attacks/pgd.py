"""Projected gradient descent: one loop, the norm and the objective as hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..config import check_budget, require
from ..errors import InputError
from ..functional.projection import BALLS, project_pixels
from ..modes import evaluating
from ..types import ImageModel

AttackObjective = Callable[[Tensor, Tensor], Tensor]
"""Maps model outputs and targets to one loss per image `(N,)`, which the attack maximises."""


class Attack(Protocol):
    """What every per-image attack on a classifier is: a budget, and a call that spends it."""

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""

    @property
    def norm(self) -> str:
        """Norm of the ball, `"linf"` or `"l2"`."""

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Return the attacked images, in the ball and in [0, 1], detached."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image, logits `(N, K)` and labels `(N,)` to `(N,)`."""
    return F.cross_entropy(outputs, targets, reduction="none")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the best wrong logit less the right one for each image `(N,)`: positive where the attack has won."""
    right = outputs.gather(1, targets[:, None]).squeeze(1)
    wrong = outputs.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    return wrong - right


def dlr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the difference of logits ratio of each image: the margin over the gap of the first and third logit.

    `(max_{i != y} z_i - z_y) / (z_(1) - z_(3))` with `z_(1) >= z_(2) >= ...`. Unlike the cross-entropy it does not
    change when logits are shifted or scaled, so a model cannot hide its gradient behind large logits.

    Args:
        outputs: Logits `(N, K)` of at least three classes.
        targets: Labels `(N,)`.

    Returns:
        `(N,)`, positive where the attack has won, in [-1, 1] while the right class is among the best two.

    Raises:
        InputError: If there are fewer than three classes.

    Examples:
        >>> import torch
        >>> dlr(torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, equation 6.
    """
    classes = outputs.shape[1]
    if classes < 3:
        raise InputError(
            f"the difference of logits ratio compares the first and third logit and needs at least 3 classes; got "
            f"{classes}. Use objective=margin or cross_entropy."
        )
    highest = outputs.topk(3, dim=1).values
    return margin(outputs, targets) / (highest[:, 0] - highest[:, 2]).clamp_min(1e-12)


def cosine_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one minus the cosine of features and target features for each image, both `(N, D)`."""
    return 1 - F.cosine_similarity(outputs, targets, dim=1)


def l2_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the Euclidean distance of features and target features for each image, both `(N, D)`."""
    distance: Tensor = torch.linalg.vector_norm(outputs - targets, dim=1)
    return distance


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
        momentum: Decay `mu` of the accumulated gradient, as in MI-FGSM: `g <- mu * g + gradient / |gradient|_1`, and
            the step ascends along `g`. Zero is plain PGD.
        restarts: Random starts, each with all steps; of every image the result with the highest objective is kept.
        objective: What the attack maximises: `cross_entropy`, `margin`, `dlr`, `cosine_distance` or any function like
            them.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
        >>> attacked = PGD(eps=8 / 255, steps=3)(model, images, labels)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083.
        Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018, arXiv 1710.06081, equation 6 (momentum).
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    random_start: bool = True
    momentum: float = 0.0
    restarts: int = 1
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
        require(math.isfinite(self.momentum) and self.momentum >= 0, "momentum", self.momentum, "zero or more")
        require(self.restarts >= 1, "restarts", self.restarts, "at least 1")
        require(
            self.restarts == 1 or self.random_start,
            "restarts",
            self.restarts,
            "1 without a random start",
        )

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
        images = images.detach()
        with evaluating(model):
            attacked = self._ascend(model, images, targets, generator)
            if self.restarts == 1:
                return attacked
            highest = self._measure(model, attacked, targets)
            for _ in range(self.restarts - 1):
                again = self._ascend(model, images, targets, generator)
                reached = self._measure(model, again, targets)
                better = (reached > highest).nonzero().flatten()
                attacked[better], highest[better] = again[better], reached[better]
        return attacked

    def _ascend(self, model: ImageModel, images: Tensor, targets: Tensor, generator: Generator | None) -> Tensor:
        ball = BALLS[self.norm]
        step_size = self.step_size or 2.5 * self.eps / max(self.steps, 1)
        delta = ball.random(images, self.eps, generator) if self.random_start else torch.zeros_like(images)
        delta = project_pixels(images, delta)
        velocity = torch.zeros_like(images)
        with torch.enable_grad():
            for _ in range(self.steps):
                delta.requires_grad_()
                loss = self.objective(model(images + delta).float(), targets).sum()
                (gradient,) = torch.autograd.grad(loss, delta)
                if self.momentum:
                    gradient = velocity = self.momentum * velocity + _unit(gradient)
                delta = ball.project(delta.detach() + step_size * ball.steepest(gradient), self.eps)
                delta = project_pixels(images, delta)
        return (images + delta).detach().clamp(0, 1)

    def _measure(self, model: ImageModel, attacked: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return self.objective(model(attacked).float(), targets)


def _unit(gradient: Tensor) -> Tensor:
    """Divide the gradient of each image by its mean absolute value: the L1 norm up to a factor no step depends on."""
    dims = tuple(range(1, gradient.ndim))
    return gradient / gradient.abs().mean(dim=dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)

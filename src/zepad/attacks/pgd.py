"""Projected gradient descent (PGD), for any norm ball and any loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..config import check_budget, require
from ..functional.projection import BALLS, project_pixels
from ..inputs import check_images
from ..modes import evaluating
from ..types import ImageModel, LossFn
from .losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent, an untargeted attack inside a norm ball around each image.

    The model is attacked in evaluation mode. Gradients are taken with respect to the images alone, so parameters, their
    `.grad`, buffers and training flags are left as they were.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        steps: Number of gradient steps.
        step_size: Length of one step in [0, 1] pixel units; None takes `2.5 * eps / steps`.
        norm: Norm of the ball, `"linf"` or `"l2"`.
        random_start: Whether to start at a random point of the ball instead of at the image.
        momentum: Decay `mu` of the accumulated gradient of MI-FGSM: `g <- mu * g + gradient / |gradient|_1`, and the
            step ascends along `g`. Zero is plain PGD.
        restarts: Number of random starts, each with all steps; the result with the largest loss is kept for each image.
        loss_fn: Loss to maximise: `cross_entropy`, `margin`, `dlr`, `cosine_distance` or any function with their
            signature.

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
    loss_fn: LossFn = cross_entropy

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
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

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to the outputs that `loss_fn` takes.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Targets that `loss_fn` takes: labels `(N,)`, or features `(N, D)` for a feature loss.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the images are malformed, or the labels do not fit the images or the model's classes.
        """
        check_images(images)

        def height(points: Tensor) -> Tensor:
            return self.loss_fn(model(points).float(), targets)

        with evaluating(model):
            return self.maximise(images, height, generator=generator)

    def maximise(
        self,
        images: Tensor,
        height: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor], Tensor] | None = None,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Maximise any function of the images by the steps of this attack, whatever its `loss_fn`.

        Args:
            images: Clean images `(N, C, H, W)` in [0, 1].
            height: Function from points `(N, C, H, W)` to what is maximised, `(N,)`.
            slope: Function from points to the direction `(N, C, H, W)` in which to ascend; None takes the gradient of
                `height`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.
        """
        images = images.detach()
        direction = partial(input_gradient, height) if slope is None else slope
        attacked = self._ascend(images, direction, generator)
        if self.restarts == 1:
            return attacked
        with torch.no_grad():
            highest = height(attacked)
        for _ in range(self.restarts - 1):
            again = self._ascend(images, direction, generator)
            with torch.no_grad():
                reached = height(again)
            better = (reached > highest).nonzero().flatten()
            attacked[better], highest[better] = again[better], reached[better]
        return attacked

    def _ascend(self, images: Tensor, slope: Callable[[Tensor], Tensor], generator: Generator | None) -> Tensor:
        ball = BALLS[self.norm]
        step_size = self.step_size or 2.5 * self.eps / max(self.steps, 1)
        delta = ball.random(images, self.eps, generator) if self.random_start else torch.zeros_like(images)
        delta = project_pixels(images, delta)
        velocity = torch.zeros_like(images)
        for _ in range(self.steps):
            gradient = slope(images + delta)
            if self.momentum:
                gradient = velocity = self.momentum * velocity + _unit(gradient)
            delta = project_pixels(images, ball.project(delta + step_size * ball.steepest(gradient), self.eps))
        return (images + delta).clamp(0, 1)


def input_gradient(height: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the gradient of the sum of a function with respect to its argument alone.

    Args:
        height: Function from points `(N, C, H, W)` to one value per point, `(N,)`.
        points: Points `(N, C, H, W)`.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(height(points).sum(), points)
    return gradient


def _unit(gradient: Tensor) -> Tensor:
    """Divide the gradient of each image by its mean absolute value, which is its L1 norm up to a constant factor."""
    dims = tuple(range(1, gradient.ndim))
    return gradient / gradient.abs().mean(dim=dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)

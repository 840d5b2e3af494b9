"""Norm balls around zero: random start, steepest ascent direction and projection for L-infinity and L2.

All functions work per image, on the first axis of `(N, C, H, W)` tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


def _l2_norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
    return norm


def project_linf(delta: Tensor, eps: float) -> Tensor:
    """Project perturbations onto the L-infinity ball: clamp each entry to [-eps, eps].

    Args:
        delta: Perturbations `(N, C, H, W)`.
        eps: Radius of the ball in [0, 1] pixel units, such as `8 / 255`.

    Returns:
        Projected perturbations of the same shape and dtype.

    Examples:
        >>> import torch
        >>> project_linf(torch.tensor([[-0.5, 0.1]]), 0.25)
        tensor([[-0.2500,  0.1000]])
    """
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """Project perturbations onto the L2 ball: rescale each one whose norm exceeds `eps`.

    Args:
        delta: Perturbations `(N, C, H, W)`.
        eps: Radius of the ball in [0, 1] pixel units.

    Returns:
        Projected perturbations of the same shape and dtype.

    Examples:
        >>> import torch
        >>> project_l2(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])
    """
    norm = _l2_norm(delta)
    return torch.where(norm > eps, delta * (eps / norm.clamp_min(torch.finfo(delta.dtype).tiny)), delta)


def random_linf(like: Tensor, eps: float, generator: Generator | None = None) -> Tensor:
    """Draw perturbations uniformly from the L-infinity ball.

    Args:
        like: Tensor `(N, C, H, W)` whose shape, dtype and device the perturbations take.
        eps: Radius of the ball in [0, 1] pixel units.
        generator: Random number generator on the device of `like`; None uses the global one.

    Returns:
        Perturbations `(N, C, H, W)`.
    """
    return (torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1) * eps


def random_l2(like: Tensor, eps: float, generator: Generator | None = None) -> Tensor:
    """Draw perturbations uniformly from the L2 ball.

    Args:
        like: Tensor `(N, C, H, W)` whose shape, dtype and device the perturbations take.
        eps: Radius of the ball in [0, 1] pixel units.
        generator: Random number generator on the device of `like`; None uses the global one.

    Returns:
        Perturbations `(N, C, H, W)`.
    """
    direction = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    radius = torch.rand(len(like), generator=generator, dtype=like.dtype, device=like.device)
    radius = radius.pow(1 / like[0].numel()).view(-1, *[1] * (like.ndim - 1))
    return steepest_l2(direction) * radius * eps


def steepest_linf(gradient: Tensor) -> Tensor:
    """Return the direction of steepest ascent of unit L-infinity norm, the sign of the gradient `(N, C, H, W)`."""
    return gradient.sign()


def steepest_l2(gradient: Tensor) -> Tensor:
    """Return the direction of steepest ascent of unit L2 norm, the gradient `(N, C, H, W)` divided by its norm.

    The direction is zero for an image whose gradient is zero.
    """
    tiny = torch.finfo(gradient.dtype).tiny
    largest = gradient.abs().amax(dim=tuple(range(1, gradient.ndim)), keepdim=True)
    direction = gradient / largest.clamp_min(tiny)  # squares of very small or large gradients leave the range of floats
    return direction / _l2_norm(direction).clamp_min(tiny)


def project_pixels(images: Tensor, delta: Tensor) -> Tensor:
    """Clip perturbations so that the perturbed images lie in [0, 1].

    Args:
        images: Images `(N, C, H, W)` in [0, 1].
        delta: Perturbations of the same shape.

    Returns:
        Perturbations of the same shape with `images + delta` in [0, 1].
    """
    return (images + delta).clamp(0, 1) - images


class Ball(NamedTuple):
    """The operations of a norm ball that an attack uses.

    Attributes:
        random: Draws uniformly from the ball, `random_linf` or `random_l2`.
        steepest: Returns the direction of steepest ascent, `steepest_linf` or `steepest_l2`.
        project: Projects onto the ball, `project_linf` or `project_l2`.
    """

    random: Callable[[Tensor, float, Generator | None], Tensor]
    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]


BALLS: dict[str, Ball] = {
    "linf": Ball(random_linf, steepest_linf, project_linf),
    "l2": Ball(random_l2, steepest_l2, project_l2),
}
"""Norm balls by the name of their norm."""

"""Norm balls around zero: random start, steepest ascent direction and projection for L-infinity and L2.

Everything works per image on `(N, C, H, W)` tensors; `eps` is a radius in [0, 1] pixel units, written `8 / 255`.
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
    """Return the nearest point of the L-infinity ball: each entry clamped to [-eps, eps].

    Examples:
        >>> import torch
        >>> project_linf(torch.tensor([[-0.5, 0.1]]), 0.25)
        tensor([[-0.2500,  0.1000]])
    """
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """Return the nearest point of the L2 ball of each image: rescaled where its norm exceeds eps.

    Examples:
        >>> import torch
        >>> project_l2(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])
    """
    norm = _l2_norm(delta)
    return torch.where(norm > eps, delta * (eps / norm.clamp_min(torch.finfo(delta.dtype).tiny)), delta)


def random_linf(like: Tensor, eps: float, generator: Generator | None = None) -> Tensor:
    """Draw uniformly from the L-infinity ball, one point per image of `like`."""
    return (torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1) * eps


def random_l2(like: Tensor, eps: float, generator: Generator | None = None) -> Tensor:
    """Draw uniformly from the L2 ball, one point per image of `like`."""
    direction = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    radius = torch.rand(len(like), generator=generator, dtype=like.dtype, device=like.device)
    radius = radius.pow(1 / like[0].numel()).view(-1, *[1] * (like.ndim - 1))
    return steepest_l2(direction) * radius * eps


def steepest_linf(gradient: Tensor) -> Tensor:
    """Return the unit step of steepest ascent in L-infinity: the sign of the gradient."""
    return gradient.sign()


def steepest_l2(gradient: Tensor) -> Tensor:
    """Return the unit step of steepest ascent in L2: the gradient of each image over its norm, or zero."""
    tiny = torch.finfo(gradient.dtype).tiny
    largest = gradient.abs().amax(dim=tuple(range(1, gradient.ndim)), keepdim=True)
    direction = gradient / largest.clamp_min(tiny)  # squares of very small or large gradients leave the range of floats
    return direction / _l2_norm(direction).clamp_min(tiny)


def project_pixels(images: Tensor, delta: Tensor) -> Tensor:
    """Shrink `delta` so that `images + delta` lies in [0, 1]."""
    return (images + delta).clamp(0, 1) - images


class Ball(NamedTuple):
    """What an attack needs to know of a norm."""

    random: Callable[[Tensor, float, Generator | None], Tensor]
    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]


BALLS: dict[str, Ball] = {
    "linf": Ball(random_linf, steepest_linf, project_linf),
    "l2": Ball(random_l2, steepest_l2, project_l2),
}
"""The norms an attack can be asked for, by name."""

"""The protocol of per-image attacks, and the search over several attempts that some of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from ..functional.precision import accurate
from ..types import ImageModel
from .losses import margin


@runtime_checkable
class Attack(Protocol):
    """A per-image attack: a budget, and a call that maps images to attacked images.

    Any object with these members works wherever the library takes an attack; no base class is needed.
    """

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""

    @property
    def norm(self) -> str:
        """Norm of the ball, `"linf"` or `"l2"`."""

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)`, or to features `(N, D)` for a feature attack.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.
        """


def likeliest_wrong(outputs: Tensor, labels: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the wrong classes with the largest logits, the likeliest first.

    Args:
        outputs: Logits `(N, K)`.
        labels: Labels, integer `(N,)`.
        count: Number of target classes; at most all wrong classes are returned.

    Returns:
        One tensor of target classes `(N,)` for each rank.
    """
    wrong = outputs.scatter(1, labels[:, None], -torch.inf)
    return wrong.topk(min(count, outputs.shape[1] - 1), dim=1).indices.unbind(dim=1)


def strongest(
    model: ImageModel,
    images: Tensor,
    labels: Tensor,
    outputs: Tensor,
    attempts: Iterable[Callable[[Tensor], Tensor]],
) -> Tensor:
    """Run attempts in turn on the images that are still classified correctly, and keep the most harmful result.

    Args:
        model: Map from images to logits `(N, K)`, which judges every attempt.
        images: Clean images `(N, C, H, W)`.
        labels: Labels, integer `(N,)`.
        outputs: Logits `(N, K)` of the clean images.
        attempts: Functions from the indices `(n,)` of images that are still classified correctly to attacked images.

    Returns:
        For each image the first attempt that changed its label, or else the candidate with the largest margin among all
        attempts and the clean image.
    """
    worst = images.clone()
    highest, won = margin(outputs, labels), outputs.argmax(dim=1) != labels
    for attempt in attempts:
        left = (~won).nonzero().flatten()
        if not len(left):
            break
        attacked = attempt(left)
        with torch.no_grad():
            outputs = accurate(model(attacked))
        reached, fooled = margin(outputs, labels[left]), outputs.argmax(dim=1) != labels[left]
        better = fooled | (reached > highest[left])
        worst[left[better]], highest[left[better]] = attacked[better], reached[better]
        won[left] = fooled
    return worst

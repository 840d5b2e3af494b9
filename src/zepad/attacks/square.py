"""Square attack: random search that uses logits alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..config import check_budget, require
from ..functional.precision import accurate
from ..inputs import check_images, check_labels
from ..modes import evaluating
from ..types import ImageModel
from .losses import margin

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which the area is halved


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack, an untargeted random search on the margin that uses logits and no gradient.

    Masked, broken or absent gradients do not hinder it. It starts from vertical stripes at the corners of the ball;
    each query sets one random square to a random corner, and the change is kept if it raises the margin. The side of
    the square shrinks by a fixed schedule, which is stretched over the number of queries. Images that are already
    misclassified are returned unchanged, and an image is no longer passed to the model once it is misclassified.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        queries: Largest number of queries for each image, the query of the clean image included.
        share: Share of the pixels that the first square covers, in (0, 1].
        norm: Norm of the ball, `"linf"`; the L2 version is not implemented.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
        >>> attacked = Square(eps=8 / 255, queries=10)(model, images, labels)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        Andriushchenko et al., Square Attack: a Query-efficient Black-box Adversarial Attack via Random Search, ECCV
        2020, arXiv 1912.00049, algorithms 1 and 2.
    """

    eps: float
    queries: int = 5000
    share: float = 0.8
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        require(self.norm == "linf", "norm", self.norm, '"linf", the only norm of this attack; use APGD for "l2"')
        check_budget(self.eps, self.norm)
        require(self.queries >= 1, "queries", self.queries, "at least 1")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)`, which need not be differentiable.
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
        attacked = images.clone()

        def look(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs = accurate(model(points))
            return margin(outputs, labels[rows]), outputs.argmax(dim=1) != labels[rows]

        with evaluating(model), torch.no_grad():
            rows = torch.arange(len(images), device=images.device)
            highest, won = look(images, rows)
            for query in range(self.queries - 1):
                if won.any():
                    rows, highest = rows[~won], highest[~won]
                if not len(rows):
                    break
                clean, best = images[rows], attacked[rows]
                if query == 0:
                    points = self._stripes(clean, generator)
                else:
                    points = self._square(clean, best, self._side(query - 1, clean), generator)
                reached, won = look(points, rows)
                better = won | (reached > highest)
                attacked[rows] = torch.where(better[:, None, None, None], points, best)
                highest = torch.where(better, reached, highest)
        return attacked

    def _side(self, query: int, images: Tensor) -> int:
        height, width = images.shape[2:]
        progress = query / self.queries * 10_000
        share = self.share / 2 ** sum(progress > halving for halving in _HALVINGS)
        return max(1, min(round(math.sqrt(share * height * width)), height, width))

    def _stripes(self, clean: Tensor, generator: Generator | None) -> Tensor:
        count, channels, _, width = clean.shape
        return (clean + self.eps * _signs((count, channels, 1, width), clean, generator)).clamp(0, 1)

    def _square(self, clean: Tensor, best: Tensor, side: int, generator: Generator | None) -> Tensor:
        inside = _windows(clean, side, generator)
        signs = _signs((*clean.shape[:2], 1, 1), clean, generator)
        points = torch.where(inside, (clean + self.eps * signs).clamp(0, 1), best)
        # A square that changes nothing would waste a query, so the sign of one of its channels is flipped.
        same = (points == best).flatten(1).all(dim=1)
        channel = _integers(clean.shape[1], len(clean), clean, generator)
        rows = torch.arange(len(clean), device=clean.device)
        signs[rows[same], channel[same]] *= -1
        return torch.where(inside, (clean + self.eps * signs).clamp(0, 1), best)


def _windows(images: Tensor, side: int, generator: Generator | None) -> Tensor:
    """Draw one square per image, as a mask `(N, 1, H, W)`."""
    count, _, height, width = images.shape
    axes = []
    for length in (height, width):
        first = _integers(length - side + 1, count, images, generator)[:, None]
        places = torch.arange(length, device=images.device)[None]
        axes.append((places >= first) & (places < first + side))
    return (axes[0][:, :, None] & axes[1][:, None, :])[:, None]


def _integers(high: int, count: int, like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=like.device)


def _signs(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1

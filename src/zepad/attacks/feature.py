"""Attacks on the features of one encoder, or of several at once: per-image downstream-agnostic examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn

from ..modes import evaluating
from ..types import ImageModel
from .pgd import PGD, AttackObjective, cosine_distance


@dataclass(frozen=True, kw_only=True)
class FeaturePGD:
    """Push the features of each image away from where they were, by projected gradient ascent.

    No label and no head is needed, so the result harms whatever is built on the encoder. Given several encoders, one
    attacked image moves the features of all of them: the mean of their distances is maximised. The attack always starts
    at random, because the distance has no slope at the image itself.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        steps: Number of gradient steps.
        step_size: As in `PGD`.
        norm: `"linf"` or `"l2"`, of the ball in pixel space.
        momentum: As in `PGD`.
        restarts: As in `PGD`.
        distance: Of features and clean features: `cosine_distance`, `l2_distance` or any function like them. An L2
            distance weighs several encoders by the size of their features; the cosine weighs them alike.

    Examples:
        >>> import torch
        >>> encoders = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, d)) for d in (4, 8)]
        >>> images = torch.rand(2, 3, 2, 2)
        >>> attacked = FeaturePGD(eps=8 / 255, steps=3)(encoders, images)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), threat model: crafted on public encoders, for no known task.
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    momentum: float = 0.0
    restarts: int = 1
    distance: AttackObjective = cosine_distance

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        self._pgd(self.distance)

    def __call__(
        self,
        model: ImageModel | Sequence[ImageModel],
        images: Tensor,
        targets: Tensor | None = None,  # noqa: ARG002 - every attack has one call form; labels play no part here
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: An encoder, images to features `(N, D)` (more axes are flattened), or a sequence of encoders.
            images: `(N, C, H, W)` in [0, 1].
            targets: Not used.
            generator: As in `PGD`.

        Returns:
            Attacked images in the ball and in [0, 1], detached.
        """
        several = isinstance(model, (Sequence, nn.ModuleList))
        encoders = tuple(cast("Sequence[ImageModel]", model)) if several else (cast(ImageModel, model),)

        def features(batch: Tensor) -> Tensor:
            return torch.cat([encoder(batch).float().flatten(1) for encoder in encoders], dim=1)

        def moved(outputs: Tensor, targets: Tensor) -> Tensor:
            pairs = zip(outputs.split(widths, dim=1), targets.split(widths, dim=1), strict=True)
            return torch.stack([self.distance(*pair) for pair in pairs]).mean(dim=0)

        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(evaluating(encoder))
            with torch.no_grad():
                parts = [encoder(images).float().flatten(1) for encoder in encoders]
            widths = [part.shape[1] for part in parts]
            return self._pgd(moved)(features, images, torch.cat(parts, dim=1), generator=generator)

    def _pgd(self, objective: AttackObjective) -> PGD:
        return PGD(
            eps=self.eps,
            steps=self.steps,
            step_size=self.step_size,
            norm=self.norm,
            momentum=self.momentum,
            restarts=self.restarts,
            objective=objective,
        )


def attack_features(
    attack: PGD, encoder: ImageModel | Sequence[ImageModel], images: Tensor, *, generator: Generator | None = None
) -> Tensor:
    """Craft per-image downstream-agnostic adversarial examples with the budget of a `PGD`: `FeaturePGD` in short.

    Args:
        attack: Budget, norm and steps; its objective becomes `cosine_distance` and its start random.
        encoder: Images to features `(N, D)`, or a sequence of encoders.
        images: `(N, C, H, W)` in [0, 1].
        generator: As in `PGD`.

    Returns:
        Attacked images in the ball and in [0, 1], detached.
    """
    feature_attack = FeaturePGD(
        eps=attack.eps,
        steps=attack.steps,
        step_size=attack.step_size,
        norm=attack.norm,
        momentum=attack.momentum,
        restarts=attack.restarts,
    )
    return feature_attack(encoder, images, generator=generator)

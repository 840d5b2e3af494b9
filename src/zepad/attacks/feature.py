"""Attacks on the features of one or several encoders: per-image downstream-agnostic adversarial examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn

from ..modes import evaluating
from ..types import ImageModel, LossFn
from .losses import cosine_distance
from .pgd import PGD


@dataclass(frozen=True, kw_only=True)
class FeaturePGD:
    """Move the features of each image away from its clean features, by projected gradient descent.

    No label and no head is needed, so the result harms whatever is built on the encoder. Given several encoders, the
    attack maximises the mean of their feature distances. It always starts at a random point, because the distance has
    no gradient at the clean image.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        steps: Number of gradient steps.
        step_size: Length of one step in [0, 1] pixel units; None takes `2.5 * eps / steps`.
        norm: Norm of the ball in pixel space, `"linf"` or `"l2"`.
        momentum: Decay of the accumulated gradient of MI-FGSM; zero is plain PGD.
        restarts: Number of random starts, each with all steps; the result with the largest distance is kept for each
            image.
        distance: Loss to maximise, a distance of features and clean features: `cosine_distance`, `l2_distance` or any
            function with their signature. The L2 distance weights several encoders by the norm of their features, the
            cosine distance weights them equally.

    Examples:
        >>> import torch
        >>> encoders = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, d)) for d in (4, 8)]
        >>> images = torch.rand(2, 3, 2, 2)
        >>> attacked = FeaturePGD(eps=8 / 255, steps=3)(encoders, images)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        ZePAD, ICLR 2026, arXiv 2602.11204 (threat model: crafted on public encoders, for an unknown task).
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    momentum: float = 0.0
    restarts: int = 1
    distance: LossFn = cosine_distance

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        self._pgd(self.distance)

    def __call__(
        self,
        model: ImageModel | Sequence[ImageModel],
        images: Tensor,
        targets: Tensor | None = None,  # noqa: ARG002 - the call of every attack; labels are not used
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Encoder that maps images to features `(N, D)`, or a sequence of encoders. Features of more axes are
                flattened.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Not used; the attack moves away from the clean features.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.
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

    def _pgd(self, loss_fn: LossFn) -> PGD:
        return PGD(
            eps=self.eps,
            steps=self.steps,
            step_size=self.step_size,
            norm=self.norm,
            momentum=self.momentum,
            restarts=self.restarts,
            loss_fn=loss_fn,
        )


def attack_features(
    attack: PGD, encoder: ImageModel | Sequence[ImageModel], images: Tensor, *, generator: Generator | None = None
) -> Tensor:
    """Craft per-image downstream-agnostic adversarial examples: `FeaturePGD` with the settings of a `PGD`.

    Args:
        attack: Attack whose settings are taken, except that the loss is `cosine_distance` and the start is random.
        encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders.
        images: Clean images `(N, C, H, W)` in [0, 1].
        generator: Random number generator on the device of the images; None uses the global one of torch.

    Returns:
        Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.
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

"""Attacks on the features of one or several encoders: per-image downstream-agnostic adversarial examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Generator, Tensor, nn

from ..arguments import check_fields, checked
from ..config import is_integer, is_number, require
from ..inputs import check_images
from ..modes import evaluating
from ..types import ImageModel, LossFn
from .losses import cosine_distance
from .pgd import PGD, input_gradient
from .transforms import diversify, gaussian_kernel, scaled, smooth


@dataclass(frozen=True, kw_only=True)
class FeaturePGD:
    """Move the features of each image away from its clean features, by projected gradient descent.

    No label and no head is needed, so the result harms whatever is built on the encoder. Given several encoders, the
    attack maximises the mean of their feature distances. It always starts at a random point, because the distance has
    no gradient at the clean image.

    Momentum, input diversity, translation invariance and scale invariance help the result transfer to encoders that the
    attack does not see. The features of transformed images are moved away from those of the clean image as it is.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        steps: Number of gradient steps.
        step_size: Length of one step in [0, 1] pixel units; None takes `2.5 * eps / steps`.
        norm: Norm of the ball in pixel space, `"linf"` or `"l2"`.
        momentum: Decay of the accumulated gradient of MI-FGSM; zero is plain PGD, the paper's value is 1.
        diversity: Probability in [0, 1] that the images are shrunk and padded at random before a gradient (`diversify`,
            DI); zero is off, the paper's value is 0.5.
        translation: Odd size of the Gaussian kernel that smooths the gradient (`smooth`, TI); None is off, the paper's
            value is 15 for images of 299 pixels.
        scales: Number of copies `x / 2^i` over which the gradient is averaged (`scaled`, SI); one is off, the
            paper's value is 5. Each copy costs a gradient.
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
        Dong et al., CVPR 2018, arXiv 1710.06081 (momentum); Xie et al., CVPR 2019, arXiv 1803.06978 (diversity);
        Dong et al., CVPR 2019, arXiv 1904.02884 (translation); Lin et al., ICLR 2020, arXiv 1908.06281 (scales).
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    momentum: float = 0.0
    diversity: float = 0.0
    translation: int | None = None
    scales: int = 1
    restarts: int = 1
    distance: LossFn = cosine_distance

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        self._pgd()
        require(is_number(self.diversity) and 0 <= self.diversity <= 1, "diversity", self.diversity, "in [0, 1]")
        size = self.translation
        odd = size is None or (is_integer(size) and size >= 1 and size % 2 == 1)
        require(odd, "translation", size, "an odd integer of at least 1, or None")
        require(is_integer(self.scales) and self.scales >= 1, "scales", self.scales, "an integer of at least 1")

    @checked
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

        Raises:
            InputError: If the images are malformed.
        """
        check_images(images)
        several = isinstance(model, (Sequence, nn.ModuleList))
        encoders = tuple(cast("Sequence[ImageModel]", model)) if several else (cast(ImageModel, model),)

        def height(points: Tensor) -> Tensor:
            moved = [self.distance(_features(encoder, points), to) for encoder, to in zip(encoders, clean, strict=True)]
            return torch.stack(moved).mean(dim=0)

        def slope(points: Tensor) -> Tensor:
            return self._slope(height, points, generator)

        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(evaluating(encoder))
            with torch.no_grad():
                clean = [_features(encoder, images) for encoder in encoders]
            return self._pgd().maximise(images, height, slope, generator=generator)

    def _slope(self, height: Callable[[Tensor], Tensor], points: Tensor, generator: Generator | None) -> Tensor:
        """Return the gradient after the transforms: the mean over the scaled copies, then smoothed."""

        def seen(points: Tensor, power: int) -> Tensor:
            return height(diversify(scaled(points, power), self.diversity, generator=generator))

        gradient = input_gradient(partial(seen, power=0), points)
        for power in range(1, self.scales):  # one after the other, so that the copies need no memory at once
            gradient = gradient + input_gradient(partial(seen, power=power), points)
        if self.translation is not None:
            gradient = smooth(gradient, gaussian_kernel(self.translation))
        return gradient / self.scales

    def _pgd(self) -> PGD:
        return PGD(
            eps=self.eps,
            steps=self.steps,
            step_size=self.step_size,
            norm=self.norm,
            momentum=self.momentum,
            restarts=self.restarts,
        )


def _features(encoder: ImageModel, images: Tensor) -> Tensor:
    return encoder(images).float().flatten(1)


@checked
def attack_features(
    attack: PGD,
    encoder: ImageModel | Sequence[ImageModel],
    images: Tensor,
    *,
    diversity: float = 0.0,
    translation: int | None = None,
    scales: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """Craft per-image downstream-agnostic adversarial examples: `FeaturePGD` with the settings of a `PGD`.

    Args:
        attack: Attack whose settings are taken, except that the loss is `cosine_distance` and the start is random.
        encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders.
        images: Clean images `(N, C, H, W)` in [0, 1].
        diversity: Probability in [0, 1] of input diversity, as in `FeaturePGD`.
        translation: Odd size of the kernel that smooths the gradient, or None, as in `FeaturePGD`.
        scales: Number of scaled copies over which the gradient is averaged, as in `FeaturePGD`.
        generator: Random number generator on the device of the images; None uses the global one of torch.

    Returns:
        Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

    Raises:
        ConfigError: If a setting is out of range.
    """
    feature_attack = FeaturePGD(
        eps=attack.eps,
        steps=attack.steps,
        step_size=attack.step_size,
        norm=attack.norm,
        momentum=attack.momentum,
        diversity=diversity,
        translation=translation,
        scales=scales,
        restarts=attack.restarts,
    )
    return feature_attack(encoder, images, generator=generator)

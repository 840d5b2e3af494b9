"""AdvEncoder, which trains a generator of one perturbation or one patch that changes the features of all images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...arguments import checked
from ...config import check_budget, require
from ...errors import InputError
from ...functional.precision import accurate
from ...functional.projection import project_linf
from ...types import ImageModel, Loader
from .crafting import AttackerImages, Encoders, _UniversalAttack, as_encoders, crafting, perturbed
from .generator import PatternGenerator
from .perturbation import UniversalPerturbation

_LOW_PASS = 8 / 64  # cycles per pixel: radius 8 in the spectrum of a 64x64 image
_ADVERSARIAL_WEIGHT = 5.0
_BETAS = (0.5, 0.999)
_PUBLISHED_PIXELS = 64 * 64


def info_nce(features: Tensor, others: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the InfoNCE loss of matching features.

    Args:
        features: Features `(N, D)`.
        others: Features `(N, D)`; row i is the positive of row i of `features`, all other rows are its negatives.
        temperature: Temperature of the cosine similarities.

    Returns:
        Mean cross-entropy over the rows, a scalar; zero for a batch of one row.

    Examples:
        >>> import torch
        >>> bool(info_nce(torch.eye(3), torch.eye(3)) < info_nce(torch.eye(3), torch.eye(3).roll(1, 0)))
        True

    References:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748, equation 4.
    """
    similarities = F.normalize(features, dim=1) @ F.normalize(others, dim=1).T / temperature
    return F.cross_entropy(similarities, torch.arange(len(features), device=features.device))


def high_frequencies(images: Tensor) -> Tensor:
    """Return the frequencies of images above 1/8 cycle per pixel, by a circular high-pass filter.

    For images of 64x64 this is the radius 8 of the paper; for other sizes the radius grows with the image.

    Args:
        images: Images `(N, C, H, W)`.

    Returns:
        Filtered images `(N, C, H, W)` of mean zero, float32 for images in half precision.
    """
    images = accurate(images)
    rows = torch.fft.fftfreq(images.shape[2], device=images.device)
    columns = torch.fft.fftfreq(images.shape[3], device=images.device)
    kept = torch.hypot(*torch.meshgrid(rows, columns, indexing="ij")) > _LOW_PASS
    filtered: Tensor = torch.fft.ifft2(torch.fft.fft2(images) * kept).real
    return filtered


def advencoder_loss(
    clean: Tensor, attacked: Tensor, *, features: list[Tensor], attacked_features: list[Tensor]
) -> Tensor:
    """Return the loss `-5 InfoNCE(f(x), f(x')) + MSE(x', x) - MSE(HF(x), HF(x'))`, which AdvEncoder minimises.

    Args:
        clean: Clean images `(N, C, H, W)`.
        attacked: Attacked images `(N, C, H, W)`.
        features: Features of the clean images, one tensor `(N, D)` per encoder. The first term is averaged over the
            encoders.
        attacked_features: Features of the attacked images, one tensor `(N, D)` per encoder.

    Returns:
        Loss, a scalar.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280.
    """
    clean, attacked = accurate(clean), accurate(attacked)
    told_apart = torch.stack([info_nce(f, g) for f, g in zip(features, attacked_features, strict=True)]).mean()
    visible = F.mse_loss(attacked, clean)
    texture = F.mse_loss(high_frequencies(attacked), high_frequencies(clean))
    return -_ADVERSARIAL_WEIGHT * told_apart + visible - texture


@dataclass(frozen=True, kw_only=True)
class _GeneratorAttack(_UniversalAttack):
    lr: float = 2e-4
    width: int | None = None
    latents: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a positive number")
        require(self.width is None or self.width >= 8, "width", self.width, "at least 8, or None")
        require(self.latents is None or self.latents >= 1, "latents", self.latents, "at least 1, or None")

    def _generator(self, channels: int, size: tuple[int, int], image_size: tuple[int, int]) -> PatternGenerator:
        share = min(1.0, image_size[0] * image_size[1] / _PUBLISHED_PIXELS)
        return PatternGenerator(
            channels=channels,
            size=size,
            width=self.width or max(64, round(1024 * share)),
            latents=self.latents or max(16, round(256 * share)),
        )

    def _train(
        self,
        encoders: Sequence[ImageModel],
        batches: Iterable[Tensor],
        size: Callable[[Tensor], tuple[int, int]],
        put: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, torch.Size]:
        """Train a generator.

        Args:
            encoders: Encoders to attack.
            batches: Batches of images, on each of which one update is made.
            size: Function from images to the size `(height, width)` of the pattern.
            put: Function that applies a pattern in (-1, 1) to images.

        Returns:
            The pattern `(1, C, H, W)` of the trained generator, and the shape `(C, H, W)` of the images.
        """
        generator: PatternGenerator | None = None
        for images in batches:
            if generator is None:
                shape = images.shape[1:]
                with torch.random.fork_rng(devices=[]):  # independent of what the loader has drawn
                    torch.manual_seed(self.seed)
                    generator = self._generator(shape[0], size(images), (shape[1], shape[2]))
                generator.to(images.device)
                weights = list(generator.parameters())
                optimizer = torch.optim.Adam(weights, lr=self.lr, betas=_BETAS)
            with torch.no_grad():
                features = [accurate(encoder(images)) for encoder in encoders]
            with torch.enable_grad():
                attacked = put(images, accurate(generator()))
                loss = advencoder_loss(
                    images,
                    attacked,
                    features=features,
                    attacked_features=[accurate(encoder(attacked)) for encoder in encoders],
                )
                gradients = torch.autograd.grad(loss, weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        assert generator is not None
        with torch.no_grad():
            return accurate(generator()), shape

    def _passes(self, attacker: AttackerImages, progress: bool) -> Iterator[Tensor]:
        batches = attacker.passes(
            self.epochs, least_epochs=20, least_updates=200, name=type(self).__name__, progress=progress
        )
        largest = 0
        for images in batches:
            largest = max(largest, len(images))
            yield images
        if largest < 2:
            raise InputError(
                "AdvEncoder contrasts the images of a batch, so it needs batches of two or more; got one image at a "
                "time. Raise the batch size."
            )


@dataclass(frozen=True, kw_only=True)
class AdvEncoder(_GeneratorAttack):
    """One L-infinity perturbation, the output of a generator trained to make features of attacked images dissimilar.

    No label and no head is needed. The output of the generator is scaled into the ball by a tanh, because a hard clamp
    would leave most of the initial output without a gradient.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 20.
        lr: Learning rate of Adam (betas 0.5 and 0.999).
        width: Number of channels of the first layer of the generator. None takes the published 1024 for images of 64x64
            and larger, and fewer in proportion to the number of pixels for smaller images, at least 64.
        latents: Number of noise vectors. None takes the published 256, scaled in the same way, at least 16.
        seed: Seed of the noise, of the generator and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280.
    """

    eps: float

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        check_budget(self.eps)

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders over which the loss is
                averaged. Encoders are left unchanged.
            images: Images `(N, C, H, W)` in [0, 1], or a loader of batches of images of one size. Labels are ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder.

        Raises:
            InputError: If images are invalid or differ in size, or every batch has a single image.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(self, encoders, attacker):
            pattern, _ = self._train(
                encoders,
                self._passes(attacker, progress),
                lambda images: (images.shape[2], images.shape[3]),
                lambda images, pattern: perturbed(images, self.eps * pattern),
            )
        delta = project_linf(self.eps * pattern, self.eps)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=self._provenance(encoders, attacker))


@dataclass(frozen=True, kw_only=True)
class AdvEncoderPatch(_GeneratorAttack):
    """AdvEncoder as a visible square patch in the lower right corner, the same on every image.

    Attributes:
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 20.
        lr: Learning rate of Adam (betas 0.5 and 0.999).
        width: Number of channels of the first layer of the generator. None takes the published 1024 for images of 64x64
            and larger, and fewer in proportion to the number of pixels for smaller images, at least 64.
        latents: Number of noise vectors. None takes the published 256, scaled in the same way, at least 16.
        seed: Seed of the noise, of the generator and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        area: Share of the image that the patch may cover, in (0, 1]. The side of the patch is rounded down to whole
            pixels, at least one.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280.
    """

    area: float = 0.03

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        require(math.isfinite(self.area) and 0 < self.area <= 1, "area", self.area, "in (0, 1], a share of the image")

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the patch on one or several encoders.

        Args:
            encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders over which the loss is
                averaged. Encoders are left unchanged.
            images: Images `(N, C, H, W)` in [0, 1], or a loader of batches of images of one size. Labels are ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation of norm `"patch"`, whose eps is the share of the pixels that the patch covers.

        Raises:
            InputError: If images are invalid or differ in size, or every batch has a single image.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(self, encoders, attacker):
            pattern, shape = self._train(encoders, self._passes(attacker, progress), self._side, _put_patch)
        patch = (pattern + 1) / 2
        delta = _in_corner(patch, shape).clamp(0, 1)
        mask = _in_corner(torch.ones_like(patch[:, :1]), shape)
        return UniversalPerturbation(
            delta=delta,
            eps=float(mask.mean()),
            norm="patch",
            mask=mask,
            provenance=self._provenance(encoders, attacker),
        )

    def _side(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[2:]
        side = min(max(1, math.isqrt(int(self.area * height * width))), height, width)
        return side, side


def _in_corner(patch: Tensor, shape: torch.Size) -> Tensor:
    return F.pad(patch, (shape[-1] - patch.shape[-1], 0, shape[-2] - patch.shape[-2], 0))


def _put_patch(images: Tensor, pattern: Tensor) -> Tensor:
    patch = ((pattern + 1) / 2).to(images.dtype)
    mask = _in_corner(torch.ones_like(patch[:, :1]), images.shape)
    return torch.where(mask == 1, _in_corner(patch, images.shape), images)

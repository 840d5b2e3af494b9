"""Pre-trained adversarial perturbations (PAP), which raise the activations of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...arguments import checked
from ...config import require
from ...functional.precision import accurate
from ...types import ImageModel, Loader
from ..layers import STAGES, stage_layers
from ..losses import cosine_distance
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, capture_all, crafting, layers_used
from .perturbation import UniversalPerturbation

_TRIAL_UPDATES = 40  # number of updates on each stage before one stage is chosen


def activation_energy(activations: Sequence[Tensor]) -> Tensor:
    """Return the mean squared activation of each layer, summed over the layers, a scalar, which PAP maximises.

    Args:
        activations: Activations of the layers, one tensor of any shape per layer.

    Examples:
        >>> import torch
        >>> activation_energy([torch.tensor([1.0, 3.0]), torch.tensor([2.0])])
        tensor(9.)
    """
    return torch.stack([activation.square().mean() for activation in activations]).sum()


@dataclass(frozen=True, kw_only=True)
class PAPBase(_SignAttack):
    """One L-infinity perturbation that maximises the activations of one layer, the basic form of PAP (L4A-base).

    The paper attacks a low layer, because low layers change least when an encoder is fine-tuned. On small encoders the
    first stage gives a weak attack. Without a given layer, a short attack is therefore run on every stage, and the
    stage is kept that moves the features of the attacker's images most. No label and no head is needed.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 50`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 1.
        seed: Seed of the random start and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        layer: Layer to attack: a stage (`"stem"`, `"stage1"` to `"stage4"`) or the name of a module. The
            paper attacks the first stage; None chooses the stage.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layer: str | None = None

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder, a module, or a sequence of encoders over which the loss is averaged. Encoders are left
                unchanged.
            images: Images `(N, C, H, W)` in [0, 1], or a loader of batches of images of one size. Labels are ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder. Its provenance contains the layer.

        Raises:
            InputError: If images are invalid or differ in size, or the encoder is no module or has no such layer.
        """
        layer = self.layer or self._most_harmful(encoder, images, progress)
        return _raise_activations(self, encoder, images, [layer], progress)

    def _most_harmful(self, encoder: Encoders, images: Tensor | Loader, progress: bool) -> str:
        encoders = as_encoders(encoder)
        known = [stage_layers(one) for one in encoders]
        stages = [stage for stage in STAGES[1:] if all(stage in layers for layers in known)]
        moved = {}
        for stage in stages:
            trial = _raise_activations(
                replace(self, layer=stage, step_size=self.eps / 12, epochs=None),
                encoders,
                images,
                [stage],
                progress,
                least_updates=_TRIAL_UPDATES,
            )
            moved[stage] = _distance_moved(self, encoders, AttackerImages(images, encoders), trial)
        return max(moved, key=moved.__getitem__, default=STAGES[0])


@dataclass(frozen=True, kw_only=True)
class PAPFuse(_SignAttack):
    """PAP on two layers at once (L4A-fuse).

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 50`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 1.
        seed: Seed of the random start and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        layers: Two layers whose mean squared activations are added: stages or names of modules.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layers: tuple[str, str] = ("stem", "stage1")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        pair = isinstance(self.layers, tuple) and len(self.layers) == 2
        require(pair, "layers", self.layers, "a pair of layer names")

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder, a module, or a sequence of encoders over which the loss is averaged. Encoders are left
                unchanged.
            images: Images `(N, C, H, W)` in [0, 1], or a loader of batches of images of one size. Labels are ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder.

        Raises:
            InputError: If images are invalid or differ in size, or the encoder is no module or has no such layer.
        """
        return _raise_activations(self, encoder, images, self.layers, progress)


@dataclass(frozen=True, kw_only=True)
class PAPUGS(_SignAttack):
    """PAP with noise images beside the attacker's images, which reduces overfitting to one data set (L4A-ugs).

    Every batch is extended by the same number of Gaussian noise images, each with a mean and a standard deviation drawn
    uniformly (uniform Gaussian sampling). The default ranges are chosen by this library.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 50`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 1.
        seed: Seed of the random start, of the noise images and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        layer: Layer to attack: a stage (`"stem"`, `"stage1"` to `"stage4"`) or the name of a module.
        noise_mean: Range of the mean of a noise image, in [0, 1] pixel units.
        noise_std: Range of the standard deviation of a noise image, in [0, 1] pixel units.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layer: str = "stage1"
    noise_mean: tuple[float, float] = (0.4, 0.6)
    noise_std: tuple[float, float] = (0.05, 0.1)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        for name in ("noise_mean", "noise_std"):
            value = getattr(self, name)
            ordered = isinstance(value, tuple) and len(value) == 2 and 0 <= value[0] <= value[1] <= 1
            require(ordered, name, value, "a pair (low, high) in [0, 1]")

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder, a module, or a sequence of encoders over which the loss is averaged. Encoders are left
                unchanged.
            images: Images `(N, C, H, W)` in [0, 1], or a loader of batches of images of one size. Labels are ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder.

        Raises:
            InputError: If images are invalid or differ in size, or the encoder is no module or has no such layer.
        """
        return _raise_activations(self, encoder, images, [self.layer], progress, self._with_noise)

    def _with_noise(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        generator: torch.Generator | None = None
        for images in batches:
            if generator is None:
                generator = torch.Generator(images.device).manual_seed(self.seed)
            yield torch.cat([images, gaussian_images(images, self.noise_mean, self.noise_std, generator)])


def gaussian_images(
    like: Tensor, mean: tuple[float, float], std: tuple[float, float], generator: torch.Generator | None = None
) -> Tensor:
    """Draw images of Gaussian noise, each with its own uniformly drawn mean and standard deviation.

    Args:
        like: Images `(N, C, H, W)` whose shape, dtype and device are used.
        mean: Range of the mean, in [0, 1] pixel units.
        std: Range of the standard deviation, in [0, 1] pixel units.
        generator: Random number generator on the device of the images; None uses the global one of torch.

    Returns:
        Noise images `(N, C, H, W)`, clamped to [0, 1].
    """
    levels = torch.rand(2, len(like), 1, 1, 1, generator=generator, device=like.device)
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    means = mean[0] + (mean[1] - mean[0]) * levels[0]
    deviations = std[0] + (std[1] - std[0]) * levels[1]
    return (means + deviations * noise).clamp(0, 1).to(like.dtype)


def _distance_moved(
    attack: _SignAttack, encoders: Sequence[ImageModel], attacker: AttackerImages, perturbation: UniversalPerturbation
) -> float:
    """Return the mean cosine distance of clean and attacked features over the attacker's images and the encoders."""
    total = torch.zeros(())
    with crafting(attack, encoders, attacker), torch.no_grad():
        for images in attacker.one_pass():
            attacked = perturbation.apply(images)
            for encoder in encoders:
                clean, moved = (accurate(encoder(batch)).flatten(1) for batch in (images, attacked))
                total += cosine_distance(moved, clean).sum().cpu() / len(encoders)
    return float(total) / attacker.count


def _raise_activations(
    attack: _SignAttack,
    encoder: Encoders,
    images: Tensor | Loader,
    layers: Sequence[str],
    progress: bool,
    joined: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda batches: batches,
    least_updates: int = 200,
) -> UniversalPerturbation:
    encoders = as_encoders(encoder)
    attacker = AttackerImages(images, encoders)
    with crafting(attack, encoders, attacker), capture_all(encoders, layers) as read:
        batches = attacker.passes(
            attack.epochs, least_epochs=1, least_updates=least_updates, name=type(attack).__name__, progress=progress
        )
        delta = ascend(
            lambda _, attacked: torch.stack([activation_energy(outputs) for outputs in read(attacked)]).mean(),
            joined(batches),
            eps=attack.eps,
            step_size=attack.step_size or attack.eps / 50,
            seed=attack.seed,
        )
    provenance = attack._provenance(encoders, attacker, layers_used=layers_used(encoders, layers))
    return UniversalPerturbation(delta=delta, eps=attack.eps, provenance=provenance)

"""Pre-trained adversarial perturbations (PAP): raise the activations of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import require
from ...functional.precision import accurate
from ...types import ImageModel, Loader
from ..layers import STAGES, stage_layers
from ..losses import cosine_distance
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, capture_all, crafting, layers_used
from .perturbation import UniversalPerturbation

_TRIAL_UPDATES = 40  # of each stage, before one is chosen


def activation_energy(activations: Sequence[Tensor]) -> Tensor:
    """Return the mean square of each layer's activations, summed over the layers: what PAP raises.

    Args:
        activations: One tensor of any shape per layer.

    Examples:
        >>> import torch
        >>> activation_energy([torch.tensor([1.0, 3.0]), torch.tensor([2.0])])
        tensor(9.)
    """
    return torch.stack([activation.square().mean() for activation in activations]).sum()


@dataclass(frozen=True, kw_only=True)
class PAPBase(_SignAttack):
    """One L-infinity perturbation that raises the activations of one layer, PAP in its basic form (L4A-base).

    The paper raises a low layer, because low layers change least when an encoder is fine-tuned. On small encoders the
    energy of the first stage does little harm, so without a layer the attacker tries every stage for a while, and keeps
    the one that moves the features of the attacker's images most. No label and no head is needed.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step; None takes `eps / 50`.
        epochs: Passes over the attacker's images; None takes as many as it needs for 200 updates, at least 1.
        seed: Of the random start and of the loader's order.
        layer: A stage (`"stem"`, `"stage1"` to `"stage4"`) or the name of a module; the paper's is the first stage.
            None chooses among the stages.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layer: str | None = None

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on an encoder, or on several at once.

        Args:
            encoder: A module, or a sequence of modules over which the loss is averaged; left as found.
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches of one size; labels are ignored.
            progress: Show a bar.

        Returns:
            The perturbation, on the device of the encoder. Its provenance names the layer.

        Raises:
            InputError: If images do not fit or differ in size, or the encoder is no module or has no such layer.
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
            moved[stage] = _distance_moved(encoders, AttackerImages(images, encoders), trial, self.seed)
        return max(moved, key=moved.__getitem__, default=STAGES[0])


@dataclass(frozen=True, kw_only=True)
class PAPFuse(_SignAttack):
    """PAP on two layers at once (L4A-fuse). The other fields are those of `PAPBase`.

    Attributes:
        layers: The layers whose energies are added.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layers: tuple[str, str] = ("stem", "stage1")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        super().__post_init__()
        pair = isinstance(self.layers, tuple) and len(self.layers) == 2
        require(pair, "layers", self.layers, "a pair of layer names")

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation; arguments, result and errors as in `PAPBase.fit`."""
        return _raise_activations(self, encoder, images, self.layers, progress)


@dataclass(frozen=True, kw_only=True)
class PAPUGS(_SignAttack):
    """PAP that sees noise beside the attacker's images, so that it fits no data set too closely (L4A-ugs).

    Every batch is joined by as many images of Gaussian noise, each with a mean and a deviation drawn uniformly (uniform
    Gaussian sampling). The default ranges are this library's. The other fields are those of `PAPBase`.

    Attributes:
        noise_mean: Range of the noise images' mean, in [0, 1] pixel units.
        noise_std: Range of their standard deviation, in [0, 1] pixel units.

    References:
        Ban and Dong, Pre-trained Adversarial Perturbations, NeurIPS 2022, arXiv 2210.03372.
    """

    layer: str = "stage1"
    noise_mean: tuple[float, float] = (0.4, 0.6)
    noise_std: tuple[float, float] = (0.05, 0.1)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        super().__post_init__()
        for name in ("noise_mean", "noise_std"):
            value = getattr(self, name)
            ordered = isinstance(value, tuple) and len(value) == 2 and 0 <= value[0] <= value[1] <= 1
            require(ordered, name, value, "a pair (low, high) in [0, 1]")

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation; arguments, result and errors as in `PAPBase.fit`."""
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
    """Draw images of Gaussian noise, each with a mean and a deviation of its own, drawn uniformly.

    Args:
        like: Images `(N, C, H, W)` whose shape, precision and device are taken.
        mean: Range of the mean, in [0, 1] pixel units.
        std: Range of the standard deviation, in [0, 1] pixel units.
        generator: On the device of the images; None uses torch's own.

    Returns:
        `(N, C, H, W)`, clamped to [0, 1].
    """
    levels = torch.rand(2, len(like), 1, 1, 1, generator=generator, device=like.device)
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    means = mean[0] + (mean[1] - mean[0]) * levels[0]
    deviations = std[0] + (std[1] - std[0]) * levels[1]
    return (means + deviations * noise).clamp(0, 1).to(like.dtype)


def _distance_moved(
    encoders: Sequence[ImageModel], attacker: AttackerImages, perturbation: UniversalPerturbation, seed: int
) -> float:
    """The mean cosine distance between clean and attacked features, over the attacker's images and the encoders."""
    total = torch.zeros(())
    with crafting(encoders, seed), torch.no_grad():
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
    with crafting(encoders, attack.seed), capture_all(encoders, layers) as read:
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

"""Self-supervised perturbation (SSP), which distorts the activations of an intermediate layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...arguments import checked
from ...types import Loader
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, capture_all, crafting, layers_used
from .perturbation import UniversalPerturbation


def energy_distortion(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the mean squared difference of the squared activations, a scalar, which SSP maximises.

    Args:
        clean: Activations of the clean images, of any shape.
        attacked: Activations of the attacked images, of the same shape.

    Examples:
        >>> import torch
        >>> energy_distortion(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
        tensor(4.5000)
    """
    return F.mse_loss(attacked.square(), clean.square())


@dataclass(frozen=True, kw_only=True)
class SSP(_SignAttack):
    """One L-infinity perturbation that maximises the distortion of an intermediate layer.

    No label and no head is needed. The published method perturbs each image separately; here one perturbation is
    crafted for all images, as in the literature on defenses against downstream-agnostic attacks. The attack starts at a
    random point, because the distortion has no gradient at the clean image.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 50`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 1.
        seed: Seed of the random start and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        layer: Layer to attack: a stage (`"stem"`, `"stage1"` to `"stage4"`) or the name of a module.

    References:
        Naseer et al., A Self-supervised Approach for Adversarial Robustness, CVPR 2020, arXiv 2006.04924.
    """

    layer: str = "stage2"

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
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(self, encoders, attacker), capture_all(encoders, [self.layer]) as read:

            def loss(clean: Tensor, attacked: Tensor) -> Tensor:
                with torch.no_grad():
                    before = read(clean)
                after = read(attacked)
                return torch.stack([energy_distortion(b, a) for [b], [a] in zip(before, after, strict=True)]).mean()

            batches = attacker.passes(
                self.epochs, least_epochs=1, least_updates=200, name=type(self).__name__, progress=progress
            )
            delta = ascend(loss, batches, eps=self.eps, step_size=self.step_size or self.eps / 50, seed=self.seed)
        provenance = self._provenance(encoders, attacker, layers_used=layers_used(encoders, [self.layer]))
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=provenance)

"""Self-supervised perturbation (SSP): distort the energies of a middle layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...types import Loader
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, capture_all, crafting, layers_used
from .perturbation import UniversalPerturbation


def energy_distortion(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the mean squared difference of the squared activations, a scalar: what SSP raises.

    Args:
        clean: Activations of the clean images.
        attacked: Of the attacked ones, of the same shape.

    Examples:
        >>> import torch
        >>> energy_distortion(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
        tensor(4.5000)
    """
    return F.mse_loss(attacked.square(), clean.square())


@dataclass(frozen=True, kw_only=True)
class SSP(_SignAttack):
    """One L-infinity perturbation that distorts a middle layer as far as it can.

    No label and no head is needed. The method distorts each image on its own; here one perturbation serves for all, as
    the defense literature on downstream-agnostic attacks uses it. It starts at a random point, because the distortion
    has no slope at the image itself.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step; None takes `eps / 50`.
        epochs: Passes over the attacker's images; None takes as many as it needs for 200 updates, at least 1.
        seed: Of the random start and of the loader's order.
        layer: A stage (`"stem"`, `"stage1"` to `"stage4"`) or the name of a module.

    References:
        Naseer et al., A Self-supervised Approach for Adversarial Robustness, CVPR 2020, arXiv 2006.04924.
    """

    layer: str = "stage2"

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on an encoder, or on several at once.

        Args:
            encoder: A module, or a sequence of modules over which the loss is averaged; left as found.
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches of one size; labels are ignored.
            progress: Show a bar.

        Returns:
            The perturbation, on the device of the encoder.

        Raises:
            InputError: If images do not fit or differ in size, or the encoder is no module or has no such layer.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(encoders, self.seed), capture_all(encoders, [self.layer]) as read:

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

"""Universal downstream-agnostic attack by projected gradient descent on the features of the encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...arguments import checked
from ...functional.precision import accurate
from ...types import Loader
from ..losses import cosine_distance
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, crafting
from .perturbation import UniversalPerturbation


@dataclass(frozen=True, kw_only=True)
class UniversalFeatureAttack(_SignAttack):
    """One L-infinity perturbation that moves the features of every image away from its clean features.

    The loss is the cosine distance of attacked and clean features, a simple form of the feature term of AdvEncoder. The
    perturbation is a tensor that is updated by sign steps instead of the output of a generator. No label and no head is
    needed.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 5`.
        epochs: Number of passes over the attacker's images; None takes enough for 50 updates, and at least 5.
        seed: Seed of the random start and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280 (the feature term).
    """

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
            InputError: If images are invalid or differ in size.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)

        def loss(clean: Tensor, attacked: Tensor) -> Tensor:
            distances = []
            for one in encoders:
                with torch.no_grad():
                    features = accurate(one(clean))
                distances.append(cosine_distance(accurate(one(attacked)), features).sum())
            return torch.stack(distances).mean()

        with crafting(self, encoders, attacker):
            batches = attacker.passes(
                self.epochs, least_epochs=5, least_updates=50, name=type(self).__name__, progress=progress
            )
            delta = ascend(loss, batches, eps=self.eps, step_size=self.step_size or self.eps / 5, seed=self.seed)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=self._provenance(encoders, attacker))

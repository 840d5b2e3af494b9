"""A universal downstream-agnostic attack by projected gradient steps on the encoder's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional.precision import accurate
from ...types import Loader
from ..losses import cosine_distance
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, crafting
from .perturbation import UniversalPerturbation


@dataclass(frozen=True, kw_only=True)
class UniversalFeatureAttack(_SignAttack):
    """One L-infinity perturbation that turns the features of every image away from where they were.

    The loss is the feature term of AdvEncoder in its plainest form, the cosine distance of attacked and clean features;
    the perturbation is a tensor moved by sign steps instead of the output of a generator. No label and no head is
    needed.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step; None takes `eps / 5`.
        epochs: Passes over the attacker's images; None takes as many as it needs for 50 updates, at least 5.
        seed: Of the random start and of the loader's order.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280 (the objective).
    """

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on an encoder, or on several at once.

        Args:
            encoder: Images to features `(N, D)`, or a sequence of such, over which the loss is averaged; left as found.
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches of one size; labels are ignored.
            progress: Show a bar.

        Returns:
            The perturbation, on the device of the encoder.

        Raises:
            InputError: If images do not fit, or differ in size.
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

        with crafting(encoders, self.seed):
            batches = attacker.passes(
                self.epochs, least_epochs=5, least_updates=50, name=type(self).__name__, progress=progress
            )
            delta = ascend(loss, batches, eps=self.eps, step_size=self.step_size or self.eps / 5, seed=self.seed)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=self._provenance(encoders, attacker))

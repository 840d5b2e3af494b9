"""Universal adversarial perturbation by projected gradient descent (UAPGD)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...arguments import checked
from ...config import require
from ...types import Loader
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, crafting
from .perturbation import UniversalPerturbation
from .probe import attacker_logits


def normalised_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits scaled to unit L2 norm, a scalar, which UAPGD maximises.

    The scaling keeps a gradient where the softmax of the raw logits is saturated.

    Args:
        logits: Logits `(N, K)`.
        labels: Labels, integer `(N,)`.

    Examples:
        >>> import torch
        >>> logits, labels = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
        >>> torch.equal(normalised_cross_entropy(logits, labels), normalised_cross_entropy(10 * logits, labels))
        True
    """
    return F.cross_entropy(F.normalize(logits, dim=1), labels)


@dataclass(frozen=True, kw_only=True)
class UAPGD(_SignAttack):
    """One L-infinity perturbation that maximises the cross-entropy of every image against its clean prediction.

    Each update is one momentum sign step on a batch, where the paper takes up to ten steps on each image.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step in [0, 1] pixel units; None takes `eps / 50`.
        epochs: Number of passes over the attacker's images; None takes enough for 200 updates, and at least 1.
        seed: Seed of the random start and of the order in which the loader yields images.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        momentum: Decay of the accumulated gradient, in [0, 1).
        head: Module that maps features to logits, where the features of several encoders are concatenated;
            `torch.nn.Identity()` for a classifier. None fits a linear probe on the attacker's labelled images.

    References:
        Deng and Karam, Universal Adversarial Attack via Enhanced Projected Gradient Descent, ICIP 2020.
    """

    momentum: float = 0.9
    head: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        require(math.isfinite(self.momentum) and 0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders. They are left unchanged.
            images: Loader of `(images, labels)` batches of one image size. With a `head`, also images `(N, C, H, W)` in
                [0, 1] or a loader without labels; labels are then ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder.

        Raises:
            InputError: If images are invalid or differ in size, or labels are needed and missing.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(self, (*encoders, self.head), attacker):
            logits, origin = attacker_logits(encoders, attacker, self.head)

            def loss(clean: Tensor, attacked: Tensor) -> Tensor:
                with torch.no_grad():
                    predicted = logits(clean).argmax(dim=1)
                return normalised_cross_entropy(logits(attacked), predicted)

            batches = attacker.passes(
                self.epochs, least_epochs=1, least_updates=200, name=type(self).__name__, progress=progress
            )
            delta = ascend(
                loss,
                batches,
                eps=self.eps,
                step_size=self.step_size or self.eps / 50,
                seed=self.seed,
                momentum=self.momentum,
            )
        provenance = self._provenance(encoders, attacker, logits=origin)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=provenance)

"""Universal adversarial perturbation by projected gradient descent (UAPGD)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import require
from ...types import Loader
from .crafting import AttackerImages, Encoders, _SignAttack, as_encoders, ascend, crafting
from .perturbation import UniversalPerturbation
from .probe import attacker_logits, check_head


def normalised_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits scaled to unit L2 norm, a scalar: what UAPGD raises.

    The scaling keeps the slope where the softmax of the raw logits has none left.

    Args:
        logits: `(N, K)`.
        labels: Integer `(N,)`.

    Examples:
        >>> import torch
        >>> logits, labels = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
        >>> torch.equal(normalised_cross_entropy(logits, labels), normalised_cross_entropy(10 * logits, labels))
        True
    """
    return F.cross_entropy(F.normalize(logits, dim=1), labels)


@dataclass(frozen=True, kw_only=True)
class UAPGD(_SignAttack):
    """One L-infinity perturbation that raises the cross-entropy of every image against its own clean prediction.

    Each step is a momentum sign step on a batch, where the paper takes up to ten on each image.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step; None takes `eps / 50`.
        epochs: Passes over the attacker's images; None takes as many as it needs for 200 updates, at least 1.
        seed: Of the random start and of the loader's order.
        momentum: Share of the last direction that is kept, in [0, 1).
        head: Maps features to logits, of several encoders their features side by side; `torch.nn.Identity()` for a
            classifier. None fits a linear probe on the attacker's labelled images.

    References:
        Deng and Karam, Universal Adversarial Attack via Enhanced Projected Gradient Descent, ICIP 2020.
    """

    momentum: float = 0.9
    head: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        super().__post_init__()
        require(math.isfinite(self.momentum) and 0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        check_head(self.head)

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on an encoder, or on several at once.

        Args:
            encoder: Images to features `(N, D)`, or a sequence of such; left as found.
            images: A loader of `(images, labels)` batches of one size; with a `head` one tensor `(N, C, H, W)` in
                [0, 1] or a loader with or without labels, which are ignored.
            progress: Show a bar.

        Returns:
            The perturbation, on the device of the encoder.

        Raises:
            InputError: If images do not fit or differ in size, or labels are needed and there are none.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting((*encoders, self.head), self.seed):
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

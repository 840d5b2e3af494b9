"""A universal downstream-agnostic attack by projected gradient steps on the encoder's features."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...config import check_budget, require
from ...errors import InputError
from ...functional.projection import project_linf, random_linf, steepest_linf
from ...inputs import check_reiterable, image_batches
from ...modules import evaluating
from ...types import ImageModel, Loader
from ..pgd import cosine_distance
from .perturbation import UniversalPerturbation


@dataclass(frozen=True, kw_only=True)
class UniversalFeatureAttack:
    """One L-infinity perturbation that turns the features of every image away from where they were.

    The loss is the feature term of AdvEncoder in its plainest form, the cosine distance of attacked and clean features;
    the perturbation is a tensor moved by sign steps instead of the output of a generator. No label and no head is
    needed.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        step_size: Length of one step; None takes `eps / 5`.
        epochs: Passes over the attacker's images.
        seed: Of the random start.

    References:
        Zhou et al., Downstream-agnostic Adversarial Examples, ICCV 2023, arXiv 2307.12280 (the objective).
    """

    eps: float
    step_size: float | None = None
    epochs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_budget(self.eps)
        require(self.step_size is None or self.step_size > 0, "step_size", self.step_size, "positive, or None")
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")

    def fit(self, encoder: ImageModel, images: Tensor | Loader) -> UniversalPerturbation:
        """Craft the perturbation on an encoder.

        Args:
            encoder: Images to features `(N, D)`; left as found.
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches of one size; labels are ignored.

        Returns:
            The perturbation, on the device of the images.

        Raises:
            InputError: If images do not fit, or differ in size.
        """
        if not isinstance(images, Tensor):
            check_reiterable(images)
        step_size = self.step_size or self.eps / 5
        delta: Tensor | None = None
        count = 0
        with evaluating(encoder):
            for epoch in range(self.epochs):
                for batch in image_batches(images):
                    if delta is None:
                        generator = torch.Generator(batch.device).manual_seed(self.seed)
                        delta = random_linf(batch[:1], self.eps, generator)
                    if batch.shape[1:] != delta.shape[1:]:
                        raise InputError(
                            f"a universal perturbation needs images of one size; got {tuple(delta.shape[1:])} and "
                            f"{tuple(batch.shape[1:])}. Resize them in the loader."
                        )
                    count += len(batch) if epoch == 0 else 0
                    delta = self._step(encoder, batch, delta, step_size)
        assert delta is not None
        provenance = {"attack": type(self).__name__, **asdict(self), "images": count}
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=provenance)

    def _step(self, encoder: ImageModel, images: Tensor, delta: Tensor, step_size: float) -> Tensor:
        with torch.no_grad():
            features = encoder(images).float()
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            loss = cosine_distance(encoder((images + delta).clamp(0, 1)).float(), features).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
        return project_linf(delta.detach() + step_size * steepest_linf(gradient), self.eps)

"""Running one attack on one batch: seeded, timed and held to its budget."""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..modes import autocast
from ..seeding import derive_seed
from ..types import ImageModel
from .attackers import Attacker
from .cost import count_passes
from .predictions import Predictions, predict
from .report import Cost

_TOLERANCE = 1e-5  # by which rounding may carry an attacked image out of the ball


def craft(attacker: Attacker, model: ImageModel, images: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Cost]:
    """Attack one batch.

    Args:
        attacker: The attack and its target.
        model: The evaluated model.
        images: `(N, C, H, W)` in [0, 1]; not modified.
        labels: True classes, int64 `(N,)`; not modified.
        seed: Seed of the attack's random numbers.

    Returns:
        The attacked images `(N, C, H, W)`, and what they cost in all.

    Raises:
        InputError: If the attack leaves its own ball.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    target = attacker.target(model)
    start = time.perf_counter()
    with autocast(images.device, attacker.precision), count_passes(target) as counts:
        attacked = attacker.attack(target, images.clone(), labels.clone(), generator=generator)
    seconds = time.perf_counter() - start
    check_budget_kept(attacker, images, attacked)
    return attacked, Cost(seconds=seconds, forwards=float(counts["forwards"]), gradients=float(counts["gradients"]))


class Broken:
    """The images of one batch that its attackers broke so far, for those who go on with the remaining ones."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, float], _Found] = {}

    def add(self, attacker: Attacker, attacked: Tensor, predicted: Predictions, labels: Tensor) -> None:
        """Add what one attacker did.

        Args:
            attacker: The attacker.
            attacked: Images `(N, C, H, W)` as he left them.
            predicted: What the model says of them.
            labels: True classes, int64 `(N,)`.
        """
        wrong = predicted.fused != labels.cpu()
        found = self._found.get(_ability(attacker))
        if found is not None:
            attacked = attacked.clone()
            attacked[found.wrong] = found.images[found.wrong]
            predicted, wrong = predicted.replaced(found.wrong, found.predicted.of(found.wrong)), found.wrong | wrong
        self._found[_ability(attacker)] = _Found(attacked, predicted, wrong)

    def before(self, attacker: Attacker) -> _Found | None:
        """Return the images as the first who broke them left them; None where the attacker attacks all images."""
        return self._found.get(_ability(attacker)) if attacker.remaining else None


class _Found(NamedTuple):
    """Images of one batch after several attackers.

    Attributes:
        images: Images `(N, C, H, W)`, each as the first who broke it left it.
        predicted: What the model says of them.
        wrong: Which of them it classifies wrong, bool `(N,)`.
    """

    images: Tensor
    predicted: Predictions
    wrong: Tensor


def attack_batch(
    attacker: Attacker, model: ImageModel, images: Tensor, labels: Tensor, broken: Broken, *, seed: int
) -> tuple[Tensor, Predictions, Cost]:
    """Attack one batch and ask the model, but for the images that this attacker is not asked about.

    Args:
        attacker: The attack and its target.
        model: The evaluated model.
        images: `(N, C, H, W)` in [0, 1]; not modified.
        labels: True classes, int64 `(N,)`; not modified.
        broken: What the attackers before this one did to the batch.
        seed: Seed of the attack's random numbers.

    Returns:
        The attacked images `(N, C, H, W)`, what the model says of them, and what they cost in all.

    Raises:
        InputError: If the attack leaves its own ball, or a logit is NaN.
    """
    found = broken.before(attacker)
    if found is None:
        attacked, cost = craft(attacker, model, images, labels, seed=seed)
        return attacked, predict(model, attacked), cost
    if found.wrong.all():
        return found.images, found.predicted, Cost(seconds=0.0, forwards=0.0, gradients=0.0)
    left, attacked = ~found.wrong, found.images.clone()
    attacked[left], cost = craft(attacker, model, images[left], labels[left], seed=seed)
    return attacked, found.predicted.replaced(left, predict(model, attacked[left])), cost


def _ability(attacker: Attacker) -> tuple[str, str, float]:
    return attacker.threat_model, attacker.attack.norm, attacker.attack.eps


def batch_seed(seed: int, attacker: Attacker, batch: int) -> int:
    """Return the seed of one attacker on one batch, whichever other attackers there are."""
    name = int.from_bytes(hashlib.sha256(attacker.name.encode()).digest()[:4], "big")
    return derive_seed(seed, name, batch)


def check_budget_kept(attacker: Attacker, images: Tensor, attacked: Tensor) -> None:
    """Refuse an attack that leaves its ball: its numbers would be another budget's.

    Raises:
        InputError: If shape, range or distance of the attacked images do not fit.
    """
    if attacked.shape != images.shape or not torch.isfinite(attacked).all():
        raise InputError(f"{attacker.name} returned no finite images of shape {tuple(images.shape)}.")
    eps, norm = attacker.attack.eps, attacker.attack.norm
    used, rounding = _distance(images, attacked, norm)
    low, high = (float(bound) for bound in attacked.aminmax())
    if used > eps + _TOLERANCE + rounding or low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise InputError(
            f"{attacker.name} left its ball: {norm} distance {used:.4g} of {eps:.4g}, "
            f"pixels in [{low:.4g}, {high:.4g}]. Project its result, or state the budget it uses."
        )


def _distance(images: Tensor, attacked: Tensor, norm: str) -> tuple[float, float]:
    """Return the largest distance of an attacked image from its original, and what rounding may add to it."""
    delta = (attacked.double() - images.double()).flatten(1)
    rounding = torch.finfo(images.dtype).eps / 2 * (1 if norm == "linf" else delta.shape[1] ** 0.5)
    if norm == "patch":
        used = (attacked != images).any(dim=1).flatten(1).float().mean(dim=1)
    else:
        used = torch.linalg.vector_norm(delta, ord=torch.inf if norm == "linf" else 2, dim=1)
    return float(used.max()), rounding

"""Gen-AF: adversarial fine-tuning that keeps the clean topology, then clean fine-tuning of redundant layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..config import is_integer, is_number, require
from ..functional import genetic_regularization
from ..functional.precision import accurate
from ..modes import evaluating
from ..modules import Branch
from .base import Adaptation, Batch, ObjectiveOutput, Recipe


def gen_af(
    *,
    genetic_weight: float = 1.0,
    redundant_share: float = 0.2,
    radius: float = 0.1,
    probes: int = 256,
    adaptation_lr: float = 1e-3,
    adaptation_epochs: int | None = None,
) -> Recipe:
    """Return the two-stage recipe of Gen-AF, genetic evolution-nurtured adversarial fine-tuning.

    Stage 1, dual-track: `CE(F(E(x + delta)), y) + genetic_weight * L_gr / N`, with one rate for the encoder (`lr`) and
    one for the classifier (`head_lr`). Stage 2, evolutionary adaptability: the share of layers whose perturbation costs
    the least robust loss (`robust_criticality`) is trained on clean images; everything else is frozen, BatchNorm's
    statistics included.

    Clean and adversarial images of stage 1 pass BatchNorm in two forwards, both with gradients and both training the
    statistics, as in the reference. `L_gr` pulls the adversarial structure to the clean one, as in the paper; the
    reference code calls it with the two swapped.

    Args:
        genetic_weight: Weight of the genetic regularisation per row. The reference weighs its sum over a batch of
            256 with 20, which is 20 * 256 here and kept short runs from learning: held-out digits after 80 updates,
            benign and PGD-20 accuracy, 96.3 and 75.3 % with 1, 92.3 and 74.0 % with 10, 25.0 and 11.3 % with 20 * 256.
            Choose it on validation images for long runs.
        redundant_share: Share of the layers that stage 2 trains, in (0, 1]; at least one is.
        radius: Radius of the ball in which a layer is perturbed, relative to the norm of its weights.
        probes: Number of attacked images on which layers are compared.
        adaptation_lr: Peak learning rate of stage 2.
        adaptation_epochs: Number of passes of stage 2; None takes as many as benign training does.

    Raises:
        ConfigError: If a setting is out of range.

    References:
        Zhou et al., Securely Fine-tuning Pre-trained Encoders Against Adversarial Examples, IEEE S&P 2024,
        arXiv 2403.10801, section IV.
    """
    share, epochs = redundant_share, adaptation_epochs
    require(is_number(genetic_weight) and genetic_weight >= 0, "genetic_weight", genetic_weight, "zero or more")
    require(is_number(share) and 0 < share <= 1, "redundant_share", share, "in (0, 1]")
    require(is_number(radius) and radius > 0, "radius", radius, "a positive number")
    require(is_integer(probes) and probes >= 1, "probes", probes, "an integer of at least 1")
    require(is_number(adaptation_lr) and adaptation_lr > 0, "adaptation_lr", adaptation_lr, "a positive number")
    require(epochs is None or (is_integer(epochs) and epochs >= 1), "adaptation_epochs", epochs, "at least 1, or None")

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        attacked, logits = branch(batch.adversarial), branch(batch.images)
        loss = F.cross_entropy(attacked.float(), batch.labels)
        if genetic_weight:
            genetic = genetic_regularization(adversarial=attacked, benign=logits, labels=batch.labels)
            loss = loss + genetic_weight * genetic / len(logits)
        return ObjectiveOutput(loss, attacked.detach(), logits.detach())

    def choose(branch: Branch, batches: Sequence[Batch]) -> list[str]:
        criticality = robust_criticality(branch, batches, radius=radius)
        return sorted(criticality, key=criticality.__getitem__)[: max(1, int(share * len(criticality)))]

    return Recipe(
        name=(
            f"gen_af(genetic_weight={genetic_weight:g}, redundant_share={share:g}, radius={radius:g}, "
            f"probes={probes}, adaptation_lr={adaptation_lr:g}, adaptation_epochs={epochs})"
        ),
        objective=objective,
        adaptation=Adaptation(choose=choose, images=probes, lr=adaptation_lr, epochs=epochs),
    )


def robust_criticality(
    branch: Branch, batches: Sequence[Batch], *, radius: float = 0.1, steps: int = 10
) -> dict[str, float]:
    """Return how much robust loss a worst-case change of each layer's weights costs.

    `MRC_i = max_{||D|| <= radius * ||W_i||} R(W_i + D) - R(W_i)` with `R` the mean cross-entropy of fixed adversarial
    images, found by projected gradient ascent along the normalised gradient. A low value marks a layer that robustness
    does not depend on.

    Args:
        branch: The branch to examine, in evaluation mode throughout; nothing of it is changed.
        batches: Batches with adversarial images and labels.
        radius: Radius of the ball, relative to the norm of the layer's weights.
        steps: Number of steps of gradient ascent.

    Returns:
        The increase of the loss by name of each convolution and linear layer, in the order of the modules.

    References:
        Zhu et al., Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning, ICCV 2023,
        arXiv 2308.02533, definition 3.1; Gen-AF (arXiv 2403.10801) uses it to find redundant layers.
    """
    with evaluating(branch), torch.enable_grad():
        return {
            name: _cost(branch, f"{name}.weight", layer.weight.detach(), batches, radius, steps)
            for name, layer in branch.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and isinstance(layer.weight, nn.Parameter)
        }


def _cost(branch: Branch, name: str, weight: Tensor, batches: Sequence[Batch], radius: float, steps: int) -> float:
    limit = radius * weight.norm()
    change = torch.zeros_like(weight)
    losses = []
    for _ in range(steps):
        loss, gradient = _robust_loss(branch, name, weight, change, batches)
        losses.append(loss)
        change = change + 2.5 / steps * limit * gradient / gradient.norm().clamp_min(1e-30)
        change = change * (limit / change.norm().clamp_min(1e-30)).clamp_max(1)
    losses.append(_robust_loss(branch, name, weight, change, batches)[0])
    return max(losses) - losses[0]


def _robust_loss(
    branch: Branch, name: str, weight: Tensor, change: Tensor, batches: Sequence[Batch]
) -> tuple[float, Tensor]:
    total, count = 0.0, sum(len(batch.labels) for batch in batches)
    gradient = torch.zeros_like(weight)
    change = change.requires_grad_()
    for batch in batches:
        logits = functional_call(branch, {name: weight + change}, (batch.adversarial,))
        loss = F.cross_entropy(accurate(logits), batch.labels, reduction="sum") / count
        gradient += torch.autograd.grad(loss, change)[0]
        total += loss.item()
    return total, gradient

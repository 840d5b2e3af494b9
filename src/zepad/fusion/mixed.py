"""MixedNUTS, which mixes probabilities after a nonlinear transform of the robust logits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks import margin
from ..config import is_number, require
from .base import FusionRule, ValidationLogits

_SCALES, _POWERS, _BIASES = (1.0, 3.0, 0.3, 10.0, 0.1), (2.0, 3.0, 1.0, 4.0, 6.0), (-1.0, -0.5, -1.5, 0.0, -2.0)


@dataclass(frozen=True, kw_only=True)
class MixedNUTS(FusionRule):
    """Mix the probabilities of the hardened branches with the decision of the benign branch, as MixedNUTS does.

    Let `h` be the mean logits of the hardened branches, standardised over the classes, and `g = GELU(h + bias)`. The
    fused logits are `log((1 - a) * softmax(scale * sign(g) * |g| ** power) + a * onehot(benign))`, where `a` is the
    benign weight. They are the logarithm of probabilities that sum to 1. A class whose transformed probability leads
    every other class by more than `a / (1 - a)` is the decision, whatever the benign branch predicts.

    GELU decreases before it increases. If `h + bias` of the best class is below about zero, the transform reverses the
    order of the classes and the benign branch decides. With two classes `h` is at most 0.71, so keep `bias` above -0.7
    there. The published formula behaves the same.

    Where several classes are first in the benign branch, as for one that abstains, they share its vote.

    The one-hot vote has no gradient. Here it takes the gradient of the benign branch's softmax, so that gradient-based
    attacks are not weakened.

    `calibrate` searches a grid of transforms, each with the smallest benign weight that reaches the floor, for the one
    under which most attacked images lead by more than that weight can overturn. MixedNUTS instead fixes the robust
    accuracy and maximises the benign accuracy.

    Attributes:
        scale: Positive factor of the transformed logits.
        power: Exponent of the transform, from 1 to 10; larger powers separate confident from unconfident decisions.
        bias: Number added before the GELU.
        benign_weight: Weight `a` of the benign branch in [0, 1), which is `1 - alpha` in MixedNUTS.

    References:
        Bai, Zhou, Patel, Sojoudi, MixedNUTS: Training-Free Accuracy-Robustness Balance via Nonlinearly Mixed
        Classifiers, TMLR 2024, arXiv 2402.02263, section 4.
    """

    min_branches: ClassVar[int] = 2
    needs_attacked: ClassVar[bool] = True

    scale: float = 5.0
    power: float = 4.0
    bias: float = -1.0
    benign_weight: float = 0.3

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            ConfigError: If a setting is out of range.
        """
        require(is_number(self.scale) and 0 < self.scale < 1e6, "scale", self.scale, "a positive number")
        require(is_number(self.power) and 1 <= self.power <= 10, "power", self.power, "a number from 1 to 10")
        require(is_number(self.bias) and abs(self.bias) < 1e6, "bias", self.bias, "a number")
        weight = self.benign_weight
        require(is_number(weight) and 0 <= weight < 1, "benign_weight", weight, "in [0, 1)")

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the logarithm of the mixed probabilities, `(N, K)`."""
        mean = logits[:-1].mean(dim=0)
        robust = robust_transform(mean, scale=self.scale, power=self.power, bias=self.bias).log_softmax(dim=-1)
        weight = logits.new_tensor(self.benign_weight)
        robust = robust + torch.log1p(-weight)
        said = logits[-1].nan_to_num(nan=0.0)
        benign = said.log_softmax(dim=-1) + weight.log()
        first = said == said.amax(dim=-1, keepdim=True)
        share = weight.log() - first.sum(dim=-1, keepdim=True).to(weight.dtype).log()  # a tie shares the vote
        exact = torch.logaddexp(robust, torch.where(first, share, -torch.inf))
        soft = torch.logaddexp(robust, benign)
        return exact.detach() + (soft - soft.detach())

    def calibrate(self, validation: ValidationLogits, *, benign_floor: float) -> MixedNUTS:
        """Return the rule under which most attacked images keep their class, among rules that reach the floor."""
        assert validation.attacked is not None
        benign, labels = validation.logits[-1].argmax(dim=-1), validation.labels
        clean, attacked = (logits[:-1].mean(dim=0).double() for logits in (validation.logits, validation.attacked))
        best: tuple[tuple[float, float], MixedNUTS] | None = None
        for scale, power, bias in itertools.product(_SCALES, _POWERS, _BIASES):
            rows, hit = (
                robust_transform(mean, scale=scale, power=power, bias=bias).softmax(dim=-1)
                for mean in (clean, attacked)
            )
            lead, accuracy = _smallest_lead(rows, benign, labels, benign_floor)
            survives = margin(hit, labels[: len(hit)]) < -lead
            value = (min(accuracy, benign_floor), float(survives.double().mean()))
            if best is None or value > best[0]:
                # The benign branch overturns leads below a / (1 - a), which must exceed the lead found by more than
                # rounding.
                weight = min((lead + 1e-5) / (1 + lead), 0.5)
                best = (value, replace(self, scale=scale, power=power, bias=bias, benign_weight=weight))
        assert best is not None
        return best[1]

    def guarantee(self) -> str:
        """Return the bound as a sentence."""
        return (
            "An attacker who knows the whole ensemble (white box) can make the benign branch say anything; it cannot "
            "overturn hardened branches that lead in a transformed probability by more than "
            f"{self.benign_weight / (1 - self.benign_weight):.3g}."
        )


def robust_transform(logits: Tensor, *, scale: float, power: float, bias: float) -> Tensor:
    """Return `scale * sign(g) * |g| ** power` with `g = GELU(standardised logits + bias)`.

    Args:
        logits: Logits `(N, K)`, which are standardised over the classes first.
        scale: Positive factor of the result.
        power: Exponent, at least 1.
        bias: Number added before the GELU.

    Returns:
        Transformed logits `(N, K)`.

    References:
        Bai et al., MixedNUTS, TMLR 2024, arXiv 2402.02263, section 4.
    """
    bounded_logits = logits.clamp(-1e15, 1e15)  # the variance of larger logits overflows
    centred = bounded_logits - bounded_logits.mean(dim=-1, keepdim=True)
    clamped = F.gelu(centred / (bounded_logits.var(dim=-1, keepdim=True) + 1e-8).sqrt() + bias)
    return scale * clamped.sign() * clamped.abs() ** power


def _smallest_lead(robust: Tensor, benign: Tensor, labels: Tensor, floor: float) -> tuple[float, float]:
    """Return the smallest lead that the benign branch must overturn for the floor, and the accuracy there."""
    top, says = robust.max(dim=-1)
    lacks = top - robust.gather(1, benign[:, None]).squeeze(1)  # zero where both agree
    candidates, order = lacks.sort()
    # Entry k is the accuracy with the k smallest leads overturned: the benign branch decides on those images and the
    # hardened branches on the others.
    gained = (benign == labels)[order].double().cumsum(dim=0)
    kept = (says == labels)[order].double()
    accuracy = torch.cat([kept.sum()[None], gained + kept.sum() - kept.cumsum(dim=0)]) / len(labels)
    leads = torch.cat([candidates.new_zeros(1), candidates])
    wanted = min(floor, float(accuracy.max()))
    first = int((accuracy >= wanted).nonzero()[0])
    return float(leads[first]), float(accuracy[first])

"""MixedNUTS: probabilities mixed after a nonlinear transform of the robust logits."""

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
    """Mix the probabilities of the hardened branches with a vote of the benign branch, as MixedNUTS does.

    With `h` the mean logits of the hardened branches, standardised over the classes, and `g = GELU(h + bias)`:
    `log((1 - a) * softmax(scale * sign(g) * |g| ** power) + a * onehot(benign))`, where `a` is the benign weight. The
    result is the logarithm of probabilities that sum to 1. A decision stands whatever the benign branch says where the
    transformed probabilities lead by more than `a / (1 - a)`.

    GELU falls before it rises. Where the best class does not clear the clamp, `h + bias` below zero or so, the order of
    the classes turns round and the benign branch decides. With two classes `h` is at most 0.71, so keep `bias` above
    -0.7 there. The published formula behaves the same.

    The gradient passes the one-hot vote as if it were the benign branch's softmax: in the published form it has none,
    which would be a gift to weak attacks.

    `calibrate` searches a grid of transforms, each with the smallest benign weight that reaches the floor, for the one
    under which most attacked images lead by more than that weight can overturn. The paper exchanges the roles of the
    two accuracies: it asks for robustness and makes benign accuracy as large as it can.

    Attributes:
        scale: Positive factor of the transformed logits.
        power: Exponent of the transform, from 1 to 10; larger powers separate sure from unsure decisions.
        bias: Number added before the soft clamp.
        benign_weight: Weight `a` of the benign branch in [0, 1); the paper's `1 - alpha`.

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
            ConfigError: Naming the setting, its value and what was expected.
        """
        require(is_number(self.scale) and 0 < self.scale < 1e6, "scale", self.scale, "a positive number")
        require(is_number(self.power) and 1 <= self.power <= 10, "power", self.power, "a number from 1 to 10")
        require(is_number(self.bias) and abs(self.bias) < 1e6, "bias", self.bias, "a number")
        weight = self.benign_weight
        require(is_number(weight) and 0 <= weight < 1, "benign_weight", weight, "in [0, 1)")

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the logarithms of the mixed probabilities, `(N, K)`."""
        mean = logits[:-1].mean(dim=0)
        robust = robust_transform(mean, scale=self.scale, power=self.power, bias=self.bias).log_softmax(dim=-1)
        weight = logits.new_tensor(self.benign_weight)
        robust = robust + torch.log1p(-weight)
        benign = logits[-1].nan_to_num(nan=0.0).log_softmax(dim=-1) + weight.log()
        one_hot = F.one_hot(benign.argmax(dim=-1), benign.shape[-1]).bool()
        exact = torch.logaddexp(robust, torch.where(one_hot, weight.log(), -torch.inf))
        soft = torch.logaddexp(robust, benign)
        return exact.detach() + (soft - soft.detach())

    def calibrate(self, validation: ValidationLogits, *, benign_floor: float) -> MixedNUTS:
        """Return the rule with the transform and weight under which most attacked images survive at the floor."""
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
                # The decision is the benign branch's where it lacks less than a / (1 - a): above the lead found, by
                # more than rounding.
                weight = min((lead + 1e-5) / (1 + lead), 0.5)
                best = (value, replace(self, scale=scale, power=power, bias=bias, benign_weight=weight))
        assert best is not None
        return best[1]

    def guarantee(self) -> str:
        """Return the bound in words."""
        return (
            "An attacker who knows the whole ensemble (white box) can make the benign branch say anything; it cannot "
            "overturn hardened branches that lead in a transformed probability by more than "
            f"{self.benign_weight / (1 - self.benign_weight):.3g}."
        )


def robust_transform(logits: Tensor, *, scale: float, power: float, bias: float) -> Tensor:
    """Return `scale * sign(g) * |g| ** power` with `g = GELU(standardised logits + bias)`.

    Args:
        logits: Logits `(N, K)`, standardised here over the classes.
        scale: Positive factor of the result.
        power: Exponent, at least 1.
        bias: Number added before the GELU.

    Returns:
        Transformed logits `(N, K)`.

    References:
        Bai et al., MixedNUTS, TMLR 2024, arXiv 2402.02263.
    """
    bounded_logits = logits.clamp(-1e15, 1e15)  # beyond it the variance overflows
    centred = bounded_logits - bounded_logits.mean(dim=-1, keepdim=True)
    clamped = F.gelu(centred / (bounded_logits.var(dim=-1, keepdim=True) + 1e-8).sqrt() + bias)
    return scale * clamped.sign() * clamped.abs() ** power


def _smallest_lead(robust: Tensor, benign: Tensor, labels: Tensor, floor: float) -> tuple[float, float]:
    """Return the smallest lead that the benign branch must overturn for the floor, and the accuracy there."""
    top, says = robust.max(dim=-1)
    lacks = top - robust.gather(1, benign[:, None]).squeeze(1)  # zero where both agree
    candidates, order = lacks.sort()
    # With the k smallest overturned: right are those among them where the benign branch is, and the others' own.
    gained = (benign == labels)[order].double().cumsum(dim=0)
    kept = (says == labels)[order].double()
    accuracy = torch.cat([kept.sum()[None], gained + kept.sum() - kept.cumsum(dim=0)]) / len(labels)
    leads = torch.cat([candidates.new_zeros(1), candidates])
    wanted = min(floor, float(accuracy.max()))
    first = int((accuracy >= wanted).nonzero()[0])
    return float(leads[first]), float(accuracy[first])

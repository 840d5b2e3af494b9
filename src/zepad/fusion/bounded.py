"""The recommended fusion rule, a bounded vote of the benign branch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..config import is_number, require
from ..functional import hardened_log_probabilities
from .base import FusionRule, ValidationLogits

_VOTES = (0.0, *(2.0 ** (i / 8) for i in range(-56, 57)))  # zero, then 1/128 to 128 in eighths of an octave


@dataclass(frozen=True, kw_only=True)
class Bounded(FusionRule):
    """Add a bounded vote of the benign branch to the decision of the hardened branches, `log p_H + vote * p_B`.

    `p_H` is the mean probability of the hardened branches and `p_B` that of the benign branch. Probabilities differ by
    at most one, so a class whose `log p_H` leads every other class by more than `vote` is the decision, whatever the
    benign branch predicts. An attacker cannot win by breaking the benign branch alone.

    `calibrate` takes the smallest vote that reaches the benign floor, because a smaller vote lets the benign branch
    overturn fewer decisions. If no vote reaches the floor, it takes the smallest of the most accurate votes.

    Attributes:
        vote: Largest lead of the hardened branches, in log-probability, that the benign branch can overturn; zero or
            more. With zero the hardened branches decide alone.

    Examples:
        >>> import torch
        >>> hardened, benign = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 99.0]]])
        >>> Bounded(vote=1.9)(torch.cat([hardened, benign])).argmax().item()
        0
    """

    min_branches: ClassVar[int] = 2

    vote: float = 0.5

    def __post_init__(self) -> None:
        """Check the vote.

        Raises:
            ConfigError: If `vote` is negative or not a finite number.
        """
        require(is_number(self.vote) and 0 <= self.vote < 1e38, "vote", self.vote, "a number of zero or more")

    def fuse(self, logits: Tensor) -> Tensor:
        """Return `log p_H + vote * p_B`, `(N, K)`."""
        # The softmax of non-finite logits is NaN, which would void the bound.
        benign = logits[-1].nan_to_num(nan=0.0).softmax(dim=-1)
        return hardened_log_probabilities(logits) + self.vote * benign

    def calibrate(self, validation: ValidationLogits, *, benign_floor: float) -> Bounded:
        """Return the rule with the smallest vote that reaches the floor, or the smallest of the most accurate votes."""
        rules = [replace(self, vote=vote) for vote in _VOTES]
        accuracies = [validation.accuracy(rule) for rule in rules]
        wanted = min(benign_floor, max(accuracies))
        return next(rule for rule, accuracy in zip(rules, accuracies, strict=True) if accuracy >= wanted)

    def guarantee(self) -> str:
        """Return the bound as a sentence."""
        return (
            "An attacker who knows the whole ensemble (white box) can make the benign branch say anything; it cannot "
            f"overturn hardened branches that lead in a log-probability by more than {self.vote:.3g}."
        )

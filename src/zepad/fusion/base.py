"""Base classes of fusion rules and the register that holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..config import require
from ..functional import check_stacked, confidence
from ..functional.precision import accurate
from ..plugins import Plugin, Register

_R = TypeVar("_R", bound="FusionRule")


class ValidationLogits(NamedTuple):
    """Logits of the branches on labelled validation images, from which a rule chooses its settings.

    Attributes:
        logits: Logits of every branch `(B, N, K)`, hardened branches first, the benign branch last.
        labels: Labels of the images, int64 `(N,)`.
        attacked: Logits `(B, M, K)` of the first M images, attacked through the hardened branches; only for rules
            with `needs_attacked`.
    """

    logits: Tensor
    labels: Tensor
    attacked: Tensor | None = None

    def accuracy(self, rule: FusionRule) -> float:
        """Return the accuracy of a rule on the images, in [0, 1]."""
        return float((rule(self.logits).argmax(dim=-1) == self.labels).double().mean())


@dataclass(frozen=True, kw_only=True)
class FusionRule(Plugin, ABC):
    """Base class of fusion rules. A rule is a frozen dataclass whose fields are its settings, each with a default.

    A subclass must define `fuse` and be registered; every other method has a default:

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from zepad.fusion import FusionRule, fuse_logits, register
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Median(FusionRule):
    ...     def fuse(self, logits):
    ...         return logits.median(dim=0).values
    >>> register("median-of-logits", Median)
    >>> fuse_logits(torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[9.0, 4.0]]]), rule="median-of-logits")
    tensor([[2., 3.]])

    Attributes:
        min_branches: Smallest number of branches that the rule can fuse.
        needs_attacked: Whether `calibrate` reads `ValidationLogits.attacked`, for which an attack has to be run.
        holds_floor: Whether `calibrate` aims at the benign floor, so that a warning is issued where it is missed.
    """

    min_branches: ClassVar[int] = 1
    needs_attacked: ClassVar[bool] = False
    holds_floor: ClassVar[bool] = True

    @abstractmethod
    def fuse(self, logits: Tensor) -> Tensor:
        """Return the fused logits `(N, K)`.

        Args:
            logits: Logits `(B, N, K)`, float32 or float64, hardened branches first, the benign branch last.
        """

    def log_weights(self, logits: Tensor) -> Tensor | None:  # noqa: ARG002 - for subclasses
        """Return log-weights `(B, N)` up to a constant per image, or None for a rule that does not average logits."""
        return None

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence of each branch `(B, N)` as this rule sees it, for `ZePAD.inspect`."""
        return confidence(logits)

    def calibrate(self: _R, validation: ValidationLogits, *, benign_floor: float) -> _R:  # noqa: ARG002
        """Return the rule with the most robust settings that keep the benign accuracy. The default has none to choose.

        Args:
            validation: Logits and labels of images that no training has seen.
            benign_floor: Benign accuracy in [0, 1] to keep on these images.
        """
        return self

    def guarantee(self) -> str:
        """Return what a white-box attacker can do to this rule, in one or two sentences for model card and report."""
        return (
            "An attacker who knows the whole ensemble (white box) needs only to make the benign branch confidently "
            "wrong: under such an attack this fusion rule keeps little accuracy."
        )

    def check_branches(self, count: int) -> None:
        """Check that the rule can fuse this number of branches with its settings.

        Args:
            count: Number of branches.

        Raises:
            ConfigError: If there are too few branches, or a setting is for another number of them.
        """
        require(count >= self.min_branches, "branches", count, f"at least {self.min_branches} for {self.name}")

    @classmethod
    def has_choice(cls) -> bool:
        """Return whether `calibrate` chooses any settings of this rule."""
        return cls.calibrate is not FusionRule.calibrate

    def __call__(self, logits: Tensor) -> Tensor:
        """Fuse stacked logits.

        Args:
            logits: Logits `(B, N, K)` of any float dtype, hardened branches first, the benign branch last.

        Returns:
            Fused logits `(N, K)` in the dtype of `logits`; half precision is computed in float32.

        Raises:
            ValueError: If `logits` is not a `(B, N, K)` floating-point tensor, or has fewer than `min_branches`.
        """
        check_stacked(logits, branches=self.min_branches)
        return self.fuse(accurate(logits)).to(logits.dtype)

    def weights(self, logits: Tensor) -> Tensor | None:
        """Return the weight of each branch for each image, `(B, N)`; None for a rule that does not average logits.

        Weights are positive and sum to 1 over the branches. Arguments and errors are those of calling the rule.
        """
        check_stacked(logits, branches=self.min_branches)
        found = self.log_weights(accurate(logits))
        return None if found is None else found.softmax(dim=0).to(logits.dtype)


@dataclass(frozen=True, kw_only=True)
class AveragingRule(FusionRule):
    """Base class of rules that average logits with a weight per branch and image. A subclass defines `log_weights`."""

    @abstractmethod
    def log_weights(self, logits: Tensor) -> Tensor:
        """Return log-weights `(B, N)` up to a constant per image."""

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the weighted average of the branches' logits, `(N, K)`."""
        return weighted_average(logits, self.log_weights(logits))


def weighted_average(logits: Tensor, log_weights: Tensor) -> Tensor:
    """Return the average `(N, K)` of logits `(B, N, K)` with the softmax over branches of log-weights `(B, N)`."""
    return torch.einsum("bn,bnk->nk", log_weights.softmax(dim=0), logits)


RULES: Register[FusionRule] = Register("fusion rule", FusionRule, home="zepad.fusion")  # type: ignore[type-abstract]

"""Metrics as counts. Counts of batches add up exactly, which means of batches do not."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Count(NamedTuple):
    """`hits` out of `total`. Counts add; the rate is their quotient.

    Examples:
        >>> (Count(3, 4) + Count(1, 1)).rate
        0.8
    """

    hits: int
    total: int

    def __add__(self, other: object) -> Count:
        """Add the counts of two disjoint sets of images."""
        if not isinstance(other, Count):
            return NotImplemented
        return Count(self.hits + other.hits, self.total + other.total)

    @property
    def rate(self) -> float:
        """Hits per total, `nan` when nothing was counted."""
        return self.hits / self.total if self.total else float("nan")


def correct_count(predictions: Tensor, labels: Tensor) -> Count:
    """Count predictions that equal the label; the denominator is every image.

    Examples:
        >>> import torch
        >>> correct_count(torch.tensor([1, 2, 2]), torch.tensor([1, 2, 0]))
        Count(hits=2, total=3)
    """
    return Count(int((predictions == labels).sum()), labels.numel())


def fooling_count(*, adversarial: Tensor, benign: Tensor) -> Count:
    """Count predictions that the attack changed, right or wrong; the denominator is every image.

    The public code of the paper calls this the attack success rate.

    Examples:
        >>> import torch
        >>> fooling_count(adversarial=torch.tensor([1, 0]), benign=torch.tensor([1, 2]))
        Count(hits=1, total=2)
    """
    return Count(int((adversarial != benign).sum()), benign.numel())


def attack_success_count(*, adversarial: Tensor, benign: Tensor, labels: Tensor) -> Count:
    """Count images right before the attack and wrong after it; the denominator is those right before it.

    Examples:
        >>> import torch
        >>> attack_success_count(
        ...     adversarial=torch.tensor([1, 0, 0]), benign=torch.tensor([1, 2, 0]), labels=torch.tensor([1, 2, 2])
        ... )
        Count(hits=1, total=2)
    """
    right = benign == labels
    return Count(int((right & (adversarial != labels)).sum()), int(right.sum()))

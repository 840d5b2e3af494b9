"""Metrics as counts. Counts over batches can be added exactly; means over batches cannot."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Count(NamedTuple):
    """A number of hits out of a total. Adding two counts adds both numbers.

    Attributes:
        hits: Number of images that were counted.
        total: Number of images that could have been counted.

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
        """Hits divided by total, in [0, 1]; `nan` where the total is zero."""
        return self.hits / self.total if self.total else float("nan")


def correct_count(predictions: Tensor, labels: Tensor) -> Count:
    """Count predictions that equal the label, out of all images.

    Args:
        predictions: Predicted classes, int64 `(N,)`.
        labels: True classes, int64 `(N,)`.

    Returns:
        The count; its rate is the accuracy.

    Examples:
        >>> import torch
        >>> correct_count(torch.tensor([1, 2, 2]), torch.tensor([1, 2, 0]))
        Count(hits=2, total=3)
    """
    return Count(int((predictions == labels).sum()), labels.numel())


def fooling_count(*, adversarial: Tensor, benign: Tensor) -> Count:
    """Count predictions that the attack changed, whether or not they were correct, out of all images.

    The paper's public code calls this rate the attack success rate.

    Args:
        adversarial: Predicted classes of the attacked images, int64 `(N,)`.
        benign: Predicted classes of the same images before the attack, int64 `(N,)`.

    Returns:
        The count; its rate is the fooling rate.

    Examples:
        >>> import torch
        >>> fooling_count(adversarial=torch.tensor([1, 0]), benign=torch.tensor([1, 2]))
        Count(hits=1, total=2)
    """
    return Count(int((adversarial != benign).sum()), benign.numel())


def attack_success_count(*, adversarial: Tensor, benign: Tensor, labels: Tensor) -> Count:
    """Count images classified correctly before the attack and wrongly after it, out of those correct before it.

    Args:
        adversarial: Predicted classes of the attacked images, int64 `(N,)`.
        benign: Predicted classes of the same images before the attack, int64 `(N,)`.
        labels: True classes, int64 `(N,)`.

    Returns:
        The count; its rate is the attack success rate.

    Examples:
        >>> import torch
        >>> attack_success_count(
        ...     adversarial=torch.tensor([1, 0, 0]), benign=torch.tensor([1, 2, 0]), labels=torch.tensor([1, 2, 2])
        ... )
        Count(hits=1, total=2)
    """
    right = benign == labels
    return Count(int((right & (adversarial != labels)).sum()), int(right.sum()))

"""Surrogates of an ensemble: maps from images to logits whose gradients the fusion does not hide."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import Tensor, nn

from ..arguments import checked
from ..functional import hardened_log_probabilities

BranchLogits = Callable[[Tensor], Tensor]
"""A map from images to the stacked logits `(B, N, K)` of the branches, such as `ZePAD.branch_logits`."""


class _OfBranches(nn.Module):
    """Map images to a function of the branches' logits.

    The module behind a bound method becomes a submodule, so that an attack on the surrogate sets its evaluation mode.
    """

    def __init__(self, branch_logits: BranchLogits, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(branch_logits, MethodType) and isinstance(branch_logits.__self__, nn.Module):
            self.owner = branch_logits.__self__
        self.branch_logits = branch_logits
        self.reduce = reduce

    def forward(self, images: Tensor) -> Tensor:
        return self.reduce(self.branch_logits(images))


@checked
def mean_logits(branch_logits: BranchLogits) -> nn.Module:
    """Return the mean of the branches' logits as a surrogate, whose gradients do not pass through confidence weights.

    Robust accuracy should be quoted under the worse of an attack on this surrogate and one on the fused logits, because
    either may do more harm.

    Args:
        branch_logits: Map from images to stacked logits `(B, N, K)`: a module, or a method of one such as
            `defense.branch_logits`.

    Returns:
        A module that maps images to logits `(N, K)`.

    Examples:
        >>> import torch
        >>> mean_logits(lambda images: torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]]))(torch.zeros(1, 3, 2, 2))
        tensor([[2., 2.]])
    """
    return _OfBranches(branch_logits, lambda logits: logits.mean(dim=0))


@checked
def one_branch(branch_logits: BranchLogits, index: int) -> nn.Module:
    """Return one branch of the ensemble as a surrogate.

    Args:
        branch_logits: Map from images to stacked logits `(B, N, K)`, such as `defense.branch_logits`.
        index: Index of the branch. Hardened branches come first; -1 is the benign branch.

    Returns:
        A module that maps images to logits `(N, K)`.
    """
    return _OfBranches(branch_logits, lambda logits: logits[index])


@checked
def hardened_branches(branch_logits: BranchLogits) -> nn.Module:
    """Return the logarithm of the mean probability of the hardened branches as a surrogate.

    Args:
        branch_logits: Map from images to stacked logits `(B, N, K)` of at least two branches, the benign branch last,
            such as `defense.branch_logits`.

    Returns:
        A module that maps images to logits `(N, K)`.
    """
    return _OfBranches(branch_logits, hardened_log_probabilities)


@checked
def fused_by(branch_logits: BranchLogits, fuse: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return the ensemble under a given fusion as a surrogate, because attacks transfer between fusion rules.

    Args:
        branch_logits: Map from images to stacked logits `(B, N, K)`, such as `defense.branch_logits`.
        fuse: Map from stacked logits `(B, N, K)` to logits `(N, K)`, such as `zepad.fusion.RFDM()` or `defense.fuse`.

    Returns:
        A module that maps images to logits `(N, K)`.

    Examples:
        >>> import torch
        >>> branch_logits = lambda images: torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
        >>> surrogate = fused_by(branch_logits, lambda logits: logits.mean(dim=0))
        >>> surrogate(torch.zeros(1, 3, 2, 2)).shape
        torch.Size([1, 2])
    """
    return _OfBranches(branch_logits, fuse)

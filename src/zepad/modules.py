"""The parts a defense is built of: heads, branches and the fusion, thin modules over `zepad.functional`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import functional
from .config import FusionConfig, is_number, require


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a module in evaluation mode for a while and restore every submodule's own flag, also after an error.

    Args:
        model: An `nn.Module`; any other callable has no mode and is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True  # each flag by itself: train() would recurse and wake frozen parts


class MLPHead(nn.Sequential):
    """The classifier of a branch: Linear-ReLU-Dropout(0.2)-Linear-ReLU-Linear, features `(N, D)` to logits `(N, K)`.

    Args:
        features: Width `D` of the features and of the hidden layers.
        classes: Number `K` of classes.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), implementation details.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Linear(features, classes),
        )


class Branch(nn.Module):
    """An encoder and its head: images `(N, C, H, W)` to logits `(N, K)`."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of this branch alone."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


class Fusion(nn.Module):
    """`zepad.functional.fuse_logits` with its setting held, `(B, N, K)` to `(N, K)`.

    Examples:
        >>> import torch
        >>> Fusion()(torch.zeros(3, 2, 5)).shape
        torch.Size([2, 5])
    """

    def __init__(self, config: FusionConfig | None = None) -> None:
        super().__init__()
        self.config = config or FusionConfig()

    def forward(self, logits: Tensor) -> Tensor:
        """Return the fused logits."""
        return functional.fuse_logits(logits, rule=self.config.rule, sharpness=self.config.sharpness)

    def weights(self, logits: Tensor) -> Tensor:
        """Return the weight of each branch for each image, `(B, N)`."""
        return functional.fusion_weights(logits, rule=self.config.rule, sharpness=self.config.sharpness)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"rule={self.config.rule!r}, sharpness={self.config.sharpness:g}"


class Ensemble(nn.Module):
    """Branches and a fusion, without the stages of a `ZePAD`: what it is compared with.

    Args:
        branches: Images to logits `(N, K)`, by name; a benign branch comes last.
        fusion: How they are weighed; the paper's rule by default.
        threshold: Of the detection score, for which the last branch is the benign one; None is no detector.

    Raises:
        ConfigError: If there is no branch, or a threshold without two of them or that is no finite number.

    Examples:
        >>> import torch
        >>> branch = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> Ensemble({"one": branch, "other": branch})(torch.rand(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, branches: Mapping[str, nn.Module], *, fusion: FusionConfig | None = None, threshold: float | None = None
    ) -> None:
        super().__init__()
        require(len(branches) >= 1, "branches", list(branches), "one or more")
        require(threshold is None or is_number(threshold), "threshold", threshold, "a finite number, or None")
        require(threshold is None or len(branches) >= 2, "threshold", threshold, "None for a single branch")
        self.branches = nn.ModuleDict(branches)
        self.fusion = Fusion(fusion)
        self.threshold = threshold

    @property
    def branch_names(self) -> tuple[str, ...]:
        """One name per branch, in the order of `branch_logits`."""
        return tuple(self.branches)

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch `(B, N, K)`. Differentiable."""
        return torch.stack([branch(images) for branch in self.branches.values()])

    def forward(self, images: Tensor) -> Tensor:
        """Return the fused logits `(N, K)`."""
        fused: Tensor = self.fusion(self.branch_logits(images))
        return fused

"""The parts a defense is built of: heads, branches and the fusion, thin modules over `zepad.functional`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import functional
from .config import FusionConfig


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

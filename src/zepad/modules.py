"""The parts a branch is built of: a head, and an encoder together with its head."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .errors import StageError


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

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(N, K)` of features `(N, D)`, which an encoder may compute in another precision."""
        first = cast(nn.Linear, self[0])
        logits: Tensor = super().forward(features.to(first.weight.dtype))  # type: ignore[no-untyped-call]
        return logits


class NoHead(nn.Module):
    """The head of a branch before one is fitted."""

    def forward(self, features: Tensor) -> Tensor:  # noqa: ARG002 - every head takes features
        """Refuse to classify.

        Raises:
            StageError: Always.
        """
        raise StageError("this branch has no head yet. Fit one first.")


class Branch(nn.Module):
    """An encoder and its head: images `(N, C, H, W)` to logits `(N, K)`.

    Args:
        encoder: Module from images to features `(N, D)`.
        head: Module from features to logits; None for a branch whose head is still to be fitted.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = NoHead() if head is None else head

    @property
    def has_head(self) -> bool:
        """Whether the branch can give logits."""
        return not isinstance(self.head, NoHead)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of this branch alone."""
        logits: Tensor = self.head(self.encoder(images))
        return logits

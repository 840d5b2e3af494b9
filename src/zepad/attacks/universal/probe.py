"""Logits for attacks that need them: a given head, or a linear probe on the attacker's own labelled data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import require
from ...errors import InputError
from ...functional.precision import accurate
from ...types import ImageModel
from .crafting import AttackerImages, joint_features

_PENALTY = 1e-3  # on the squared weights: keeps the optimum finite where the classes are separable
_ITERATIONS = 200


class LinearProbe(nn.Module):
    """A linear classifier on standardised features, `(N, D)` to `(N, K)`.

    Args:
        features: The attacker's features `(N, D)`, of which mean and deviation are kept.
        classes: Number `K` of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(dim=0))
        std = features.std(dim=0, correction=0)
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))  # a dead feature stays at zero
        shape = (classes, features.shape[1])
        self.weight = nn.Parameter(torch.zeros(shape, dtype=features.dtype, device=features.device))
        self.bias = nn.Parameter(torch.zeros(classes, dtype=features.dtype, device=features.device))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        return F.linear((accurate(features) - self.mean) / self.std, self.weight, self.bias)


def fit_probe(features: Tensor, labels: Tensor) -> LinearProbe:
    """Fit a linear probe by L-BFGS on cross-entropy with a small L2 penalty; convex, so no seed is needed.

    Args:
        features: `(N, D)`, float32 or float64.
        labels: Integer `(N,)`, of at least two classes.

    Raises:
        InputError: If the labels are of one class.
    """
    classes = int(labels.max()) + 1
    if len(labels.unique()) < 2:
        raise InputError(f"a linear probe needs images of at least two classes; got the label {int(labels[0])} alone.")
    with torch.enable_grad():
        probe = LinearProbe(features.detach(), classes)
        standardised = (features.detach() - probe.mean) / probe.std
        optimizer = torch.optim.LBFGS(
            probe.parameters(), max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = F.linear(standardised, probe.weight, probe.bias)
            loss = F.cross_entropy(logits, labels) + _PENALTY * probe.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return probe.requires_grad_(False).eval()


def check_head(head: nn.Module | None) -> None:
    """Refuse a head that is no module.

    Raises:
        ConfigError: Saying what was got.
    """
    require(head is None or isinstance(head, nn.Module), "head", head, "a torch.nn.Module or None")


def attacker_logits(
    encoders: Sequence[ImageModel], images: AttackerImages, head: nn.Module | None
) -> tuple[ImageModel, str]:
    """Return a map from images to logits, and the words that record where the logits come from.

    Args:
        encoders: Their features side by side are what the head sees.
        images: Read once, with labels, unless a head is given.
        head: Features to logits, or None to fit a linear probe.

    Raises:
        InputError: If no head is given and the images carry no labels.
    """
    if head is None:
        with torch.no_grad():
            batches = [(accurate(joint_features(encoders, x)), y) for x, y in images.one_labelled_pass()]
        features, labels = (torch.cat(rows) for rows in zip(*batches, strict=True))
        head = fit_probe(features, labels)
        accuracy = float((head(features).argmax(dim=1) == labels).float().mean())
        origin = f"linear probe on the attacker's data, {images.count} images, train accuracy {accuracy:.3f}"
    else:
        origin = f"given head {type(head).__name__}"
    return lambda batch: accurate(head(joint_features(encoders, batch))), origin

"""Logits for attacks that need them: from a given head, or from a linear probe on the attacker's labelled images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...functional.precision import accurate
from ...types import ImageModel
from .crafting import AttackerImages, joint_features

_PENALTY = 1e-3  # weight of the squared weights, which keeps the optimum finite where the classes are separable
_TOLERANCE = 1e-6  # largest entry of the gradient at which the fit ends
_ITERATIONS = 1000


class LinearProbe(nn.Module):
    """A linear classifier on standardised features, `(N, D)` to `(N, K)`.

    Args:
        mean: Mean of each feature `(D,)`.
        std: Standard deviation of each feature `(D,)`, positive.
        weight: Weights `(K, D)`.
        bias: Biases `(K,)`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `(N, K)` of features `(N, D)`."""
        return F.linear((accurate(features) - self.mean) / self.std, self.weight, self.bias)


def fit_probe(features: Tensor, labels: Tensor) -> LinearProbe:
    """Fit a linear probe by logistic regression with a small L2 penalty.

    The problem is convex and is solved by L-BFGS from zero, so the result is deterministic and needs no seed.

    Args:
        features: Features `(N, D)`, float32 or float64.
        labels: Labels, integer `(N,)`, of at least two classes.

    Returns:
        A frozen module from features `(N, D)` to logits `(N, K)` of the `K` classes that occur in the labels, in
        ascending order. Its weights have the precision and the device of the features.

    Raises:
        InputError: If all labels are equal.
    """
    if len(labels.unique()) < 2:
        raise InputError(f"a linear probe needs images of at least two classes; got the label {int(labels[0])} alone.")
    features = features.detach()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))  # a constant feature becomes zero
    weight, bias = (part.to(features) for part in _logistic_regression((features - mean) / std, labels))
    return LinearProbe(mean=mean, std=std, weight=weight, bias=bias).eval()


def _logistic_regression(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights `(K, D)` and biases `(K,)` that minimise the cross-entropy plus `_PENALTY * |weights|^2`."""
    from sklearn.exceptions import ConvergenceWarning  # imported here because it takes a second
    from sklearn.linear_model import LogisticRegression

    binary = len(labels.unique()) == 2
    # scikit-learn minimises C times the summed cross-entropy plus half the squared weights. Of two classes it has one
    # row of weights, which splits into two rows of half the size, whose squares add up to half.
    strength = (1 if binary else 0.5) / (_PENALTY * len(features))
    regression = LogisticRegression(C=strength, tol=_TOLERANCE, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that has not quite converged still serves
        regression.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    return (torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2) if binary else (weight, bias)


def attacker_logits(
    encoders: Sequence[ImageModel], images: AttackerImages, head: nn.Module | None
) -> tuple[ImageModel, str]:
    """Return a map from images to logits, and a description of where the logits come from.

    Args:
        encoders: Encoders whose concatenated features are the input of the head.
        images: Images of the attacker. They are read once, with their labels, if no head is given.
        head: Map from features to logits, or None to fit a linear probe.

    Returns:
        The map from images `(N, C, H, W)` to logits `(N, K)`, and the description for the provenance.

    Raises:
        InputError: If no head is given and the images carry no labels.
    """
    if head is None:
        with torch.no_grad():
            batches = [(accurate(joint_features(encoders, x)), y) for x, y in images.one_labelled_pass()]
        features, labels = (torch.cat(rows) for rows in zip(*batches, strict=True))
        labels = labels.unique(return_inverse=True)[1]  # the probe has no row for a class that does not occur
        head = fit_probe(features, labels)
        accuracy = float((head(features).argmax(dim=1) == labels).float().mean())
        origin = f"linear probe on the attacker's data, {images.count} images, train accuracy {accuracy:.3f}"
    else:
        origin = f"given head {type(head).__name__}"
    return lambda batch: accurate(head(joint_features(encoders, batch))), origin

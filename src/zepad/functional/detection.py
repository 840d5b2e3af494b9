"""Detection scores: how suspicious an image is, as pure functions of what the encoders and heads say of it.

Larger is more suspicious, everywhere. All are differentiable, so that an attacker who knows a detector can be played.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .fusion import check_stacked, hardened_log_probabilities, mean_log_probabilities
from .precision import accurate


class Evidence(NamedTuple):
    """What a detector may look at.

    Attributes:
        logits: Of the branches `(B, N, K)`, hardened ones first, the benign one last.
        undefended: Logits of the undefended victim with a head of its own `(N, K)`, where it is kept.
        features: Of the hardened branches, and of the undefended victim on the `smoothed` images, joined `(N, D)`;
            where the undefended victim is kept.
        undefended_features: Of the undefended victim `(N, V)`, where it is kept.
    """

    logits: Tensor
    undefended: Tensor | None = None
    features: Tensor | None = None
    undefended_features: Tensor | None = None


def smoothed(images: Tensor) -> Tensor:
    """Blur images by a 3x3 Gaussian with a standard deviation of 0.8 pixels.

    A perturbation that moves an encoder is fine-grained and loses much of its effect; what the image shows stays.

    Args:
        images: `(N, C, H, W)`, any float dtype.

    Returns:
        The same shape and dtype, within the range of the images.

    References:
        Xu, Evans, Qi, Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks, NDSS 2018, arXiv
        1704.01155 (spatial smoothing).
    """
    side = math.exp(-1 / (2 * 0.8**2))
    row = images.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=images.shape[1])


def detection_score(logits: Tensor) -> Tensor:
    """Score how suspicious each image is: the confidence gap between the hardened branches and the benign branch.

    The paper's idea: an attack crafted on public encoders moves the benign branch off its training data, so that it
    loses
    confidence while the hardened branches keep theirs. How far that carries is a matter of measurement. The paper
    flags an image when the gap exceeds 0.1 but does not say how the
    two hardened confidences combine. Here the confidence is the largest softmax probability `m` and the
    hardened branches are averaged: `score = mean(m_1, ..., m_{B-1}) - m_B`.

    Args:
        logits: `(B, N, K)` with `B >= 2`, hardened branches first, the benign branch last.

    Returns:
        `(N,)` in [-1, 1]; larger is more suspicious. In the dtype of `logits`.

    Raises:
        ValueError: If there are fewer than two branches or `logits` is not `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> detection_score(torch.tensor([[[9.0, -9.0]], [[9.0, -9.0]], [[0.0, 0.0]]]))
        tensor([0.5000])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), detection.
    """
    check_stacked(logits, branches=2)
    largest = accurate(logits).softmax(dim=-1).amax(dim=-1)
    return (largest[:-1].mean(dim=0) - largest[-1]).to(logits.dtype)


def disagreement_score(logits: Tensor) -> Tensor:
    """Score how far the hardened branches and the benign branch disagree, `1 - sum_k sqrt(p_H(k) p_B(k))`.

    The sum is the Bhattacharyya coefficient of the two distributions: one where they are equal, zero where they share
    no class.

    Args:
        logits: As in `detection_score`.

    Returns:
        `(N,)` in [0, 1], in the dtype of `logits`.

    Raises:
        ValueError: As `detection_score`.

    Examples:
        >>> import torch
        >>> disagreement_score(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).round(decimals=2)
        tensor([1.])
    """
    check_stacked(logits, branches=2)
    stacked = accurate(logits)
    halves = hardened_log_probabilities(stacked) + stacked[-1].log_softmax(dim=-1)
    return (1 - (halves / 2).exp().sum(dim=-1)).clamp(0, 1).to(logits.dtype)


def sentinel_score(logits: Tensor, *, undefended: Tensor) -> Tensor:
    """Score how far the branches' mean probabilities are from the undefended victim's, `KL(ensemble || victim)`.

    An adversarial example that is crafted on the public victim fools it by construction, while the ensemble holds.
    One that fails to fool it looks benign to this score. The fusion has no part in it: a threshold outlives a change of
    the rule.

    Args:
        logits: As in `detection_score`, of one branch or more.
        undefended: Logits of the undefended victim with a head of its own `(N, K)`.

    Returns:
        `(N,)`, zero or more, in the dtype of `logits`.

    Raises:
        ValueError: As `detection_score`, or if the shapes do not fit each other.

    Examples:
        >>> import torch
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> sentinel_score(same[None], undefended=same).abs().round(decimals=6)
        tensor([0.])
    """
    check_stacked(logits)
    if logits.shape[1:] != undefended.shape:
        raise ValueError(
            f"undefended logits must have the shape (images, classes) of the branches', {tuple(logits.shape[1:])}; got "
            f"{tuple(undefended.shape)}."
        )
    ensemble = mean_log_probabilities(accurate(logits))
    victim = accurate(undefended).log_softmax(dim=-1)
    return (ensemble.exp() * (ensemble - victim)).sum(dim=-1).clamp_min(0).to(logits.dtype)


class FeatureModel(NamedTuple):
    """What the undefended victim's features should be, given `Evidence.features`: a linear map and its errors.

    Attributes:
        input_mean: Of those features `(D,)`.
        input_scale: Their standard deviations `(D,)`.
        output_mean: Of the undefended victim's features `(V,)`.
        weight: `(D, V)`.
        residual_scale: Standard deviations of what the map misses `(V,)`.
    """

    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    weight: Tensor
    residual_scale: Tensor


_RIDGE = 0.1  # per image, on standardised inputs
_FLOOR = 1e-6


def fit_features(features: Tensor, undefended: Tensor) -> FeatureModel:
    """Fit how the undefended victim's features follow from `Evidence.features`, on benign images, by ridge regression.

    Args:
        features: As in `Evidence` `(N, D)`.
        undefended: Of the undefended victim `(N, V)`.

    Returns:
        The map, in the dtype of the features, at least float32.

    Raises:
        ValueError: If there are fewer than ten images, or the numbers of images differ.

    References:
        Hoerl, Kennard, Ridge Regression, Technometrics 1970.
    """
    if len(features) != len(undefended) or len(features) < 10:
        raise ValueError(
            f"fitting the detector needs at least 10 images, with one row of features each; got {len(features)} and "
            f"{len(undefended)}."
        )
    inputs, outputs = accurate(features).double(), accurate(undefended).double()
    input_mean, output_mean = inputs.mean(dim=0), outputs.mean(dim=0)
    # A feature that never moves says nothing; divided by its deviation it would say anything.
    input_scale = inputs.std(dim=0).clamp_min(_FLOOR)
    x, y = (inputs - input_mean) / input_scale, outputs - output_mean
    penalty = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    spread = (y - x @ weight).square().mean(dim=0).sqrt()
    residual_scale = spread.clamp_min(_FLOOR + 1e-3 * float(spread.mean()))
    found = (input_mean, input_scale, output_mean, weight, residual_scale)
    # Contiguous, as they come back from a file: another layout rounds another way.
    return FeatureModel(*(tensor.to(accurate(features).dtype).contiguous() for tensor in found))


def feature_score(model: FeatureModel, *, features: Tensor, undefended: Tensor) -> Tensor:
    """Score how far the undefended victim's features are from what all other evidence leads one to expect.

    The logarithm of the mean squared error in units of the benign error. An attack on the public victim is made to move
    these very features, whether or not a label changes; the hardened encoders do not follow, nor does the victim itself
    when it sees the image blurred.

    Args:
        model: Of `fit_features`.
        features: As in `Evidence` `(N, D)`.
        undefended: Of the undefended victim `(N, V)`.

    Returns:
        `(N,)`, in the dtype of `features`; around zero for images like those it was fitted on.
    """
    given = accurate(features)
    input_mean, input_scale, output_mean, weight, residual_scale = (part.to(given.dtype) for part in model)
    x = (given - input_mean) / input_scale
    missed = (accurate(undefended).to(given.dtype) - output_mean - x @ weight) / residual_scale
    return missed.square().mean(dim=-1).clamp_min(_FLOOR).log().to(features.dtype)

"""What detectors share: blurred images, and the paper's confidence gap. Larger scores are more suspicious."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from .fusion import check_stacked
from .precision import accurate


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
    loses confidence while the hardened branches keep theirs. How far that carries is a matter of measurement. The paper
    flags an image when the gap exceeds 0.1 but does not say how the two hardened confidences combine. Here the
    confidence is the largest softmax probability `m` and the hardened branches are averaged:
    `score = mean(m_1, ..., m_{B-1}) - m_B`.

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

"""Building blocks of detectors: blurred images, the paper's confidence gap, and the gap between restored features."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .fusion import check_stacked
from .precision import accurate

_SMALLEST = 1e-6  # norm of features below which they count as zero


def smoothed(images: Tensor) -> Tensor:
    """Blur images by a 3x3 Gaussian with a standard deviation of 0.8 pixels.

    Adversarial perturbations are fine-grained and lose much of their effect on an encoder; the content of the image is
    preserved.

    Args:
        images: Images `(N, C, H, W)` of any float dtype.

    Returns:
        Blurred images of the same shape and dtype, within the range of `images`.

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
    """Return the confidence gap between the hardened branches and the benign branch for each image.

    The paper expects that an attack crafted on public encoders lowers the confidence of the benign branch, while the
    hardened branches keep theirs. It flags an image when the gap exceeds 0.1, but does not say how the two hardened
    confidences are combined. Here the confidence is the largest softmax probability `m`, averaged over the hardened
    branches: `score = mean(m_1, ..., m_{B-1}) - m_B`.

    Args:
        logits: Logits `(B, N, K)` with `B >= 2`, hardened branches first, the benign branch last.

    Returns:
        Scores `(N,)` in [-1, 1], in the dtype of `logits`; larger is more suspicious.

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


def restoration_gap(restored: Tensor, public: Tensor) -> Tensor:
    """Return how far the features of a restored encoder are from those of its public original, for each image.

    Restoration teaches the hardened encoder the features that the public one gives the benign image. On a benign image
    the two therefore agree; an adversarial example that was crafted on public encoders moves the public features alone.

    Args:
        restored: Features of the hardened encoder `(N, D)` of any float dtype.
        public: Features of the public encoder that it was hardened from, `(N, D)`.

    Returns:
        Distances `|restored - public| / |public|` in the L2 norm, `(N,)`, zero or more, in the dtype of `public`; half
        precision is computed in float32. Features that are all zero give a large, finite distance.

    Examples:
        >>> import torch
        >>> restoration_gap(torch.tensor([[3.0, 4.0], [0.0, 4.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        tensor([0.0000, 0.6000])
    """
    given, original = accurate(restored), accurate(public)
    distance: Tensor = torch.linalg.vector_norm(given - original, dim=-1)
    length: Tensor = torch.linalg.vector_norm(original, dim=-1)
    return (distance / length.clamp_min(_SMALLEST)).to(public.dtype)

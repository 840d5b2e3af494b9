"""Transforms of the transfer literature: of the images before each gradient, and of the gradient itself."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_SMALLEST = 0.9  # share of height and width to which an image shrinks at most: 299 of 330 pixels in the paper


def diversify(images: Tensor, probability: float = 0.5, *, generator: Generator | None = None) -> Tensor:
    """Shrink images to a random size and zero-pad them at a random place, the input diversity (DI) of an attack.

    The paper enlarges the padded image from 299 to 330 pixels. Here the images keep their size, because many encoders
    take one size only, and shrink by the same share at most.

    Args:
        images: Images `(N, C, H, W)` in [0, 1].
        probability: Probability in [0, 1] of a transform, which is the same for all images of the batch. At zero
            nothing is drawn from the generator.
        generator: Random number generator on the device of the images; None uses the global one of torch.

    Returns:
        Images `(N, C, H, W)` in [0, 1], differentiable with respect to `images`.

    Examples:
        >>> import torch
        >>> diversify(torch.rand(2, 3, 32, 32), probability=1.0).shape
        torch.Size([2, 3, 32, 32])

    References:
        Xie et al., Improving Transferability of Adversarial Examples with Input Diversity, CVPR 2019,
        arXiv 1803.06978, section 3.3.
    """
    if not probability:
        return images
    chance, share, *place = torch.rand(4, generator=generator, device=images.device).tolist()
    if chance >= probability:
        return images
    sides = list(images.shape[2:])
    least = [round(_SMALLEST * side) for side in sides]
    height, width = (low + int(share * (side - low + 1)) for low, side in zip(least, sides, strict=True))
    small = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    top, left = int(place[0] * (sides[0] - height + 1)), int(place[1] * (sides[1] - width + 1))
    return F.pad(small, (left, sides[1] - width - left, top, sides[0] - height - top))


def gaussian_kernel(size: int) -> Tensor:
    """Return the Gaussian kernel of translation invariance (TI), which spans three standard deviations to each side.

    Args:
        size: Odd number of rows and columns.

    Returns:
        Kernel `(size, size)`, float32, positive, of sum one.

    References:
        Dong et al., Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks, CVPR 2019,
        arXiv 1904.02884, section 3.3; three standard deviations as in the code of the authors.
    """
    line = torch.exp(-0.5 * torch.linspace(-3, 3, size) ** 2) if size > 1 else torch.ones(1)
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def smooth(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of a gradient with a kernel.

    For small shifts this is the gradient of the mean loss over shifted images, weighted by the kernel.

    Args:
        gradient: Gradient with respect to the images, `(N, C, H, W)`.
        kernel: Kernel `(K, K)`, `K` odd, such as `gaussian_kernel(15)`.

    Returns:
        Smoothed gradient `(N, C, H, W)`; outside the image the gradient counts as zero.

    References:
        Dong et al., CVPR 2019, arXiv 1904.02884, equation 7.
    """
    channels = gradient.shape[1]
    weight = kernel.to(gradient).expand(channels, 1, *kernel.shape)
    return F.conv2d(gradient, weight, padding=len(kernel) // 2, groups=channels)


def scaled(images: Tensor, power: int) -> Tensor:
    """Return the copy `x / 2^power` of scale invariance (SI), whose gradient is averaged over powers from zero.

    Args:
        images: Images `(N, C, H, W)` in [0, 1].
        power: Zero or more; zero returns the images themselves.

    References:
        Lin et al., Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks, ICLR 2020,
        arXiv 1908.06281, equation 8.
    """
    return images / 2**power if power else images

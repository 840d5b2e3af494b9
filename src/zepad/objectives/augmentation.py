"""Random changes of training images that are the same for an image and its adversarial example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..arguments import check_fields
from ..config import is_integer, require

Augmentation = Callable[[Tensor, Generator], Tensor]
"""A map from images `(N, C, H, W)`, changed at random but all channels of one image alike, and a generator."""


@dataclass(frozen=True, kw_only=True)
class FlipCrop:
    """Random horizontal flip, then a random crop after padding with zeros, as usual for small natural images.

    Attributes:
        flip: Whether each image is flipped with probability 1/2.
        padding: Number of pixels that are padded on each side before the crop; zero crops nothing.

    Examples:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> FlipCrop(padding=2)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    flip: bool = True
    padding: int = 4

    def __post_init__(self) -> None:
        """Check the padding.

        Raises:
            ConfigError: If it is no integer of zero or more.
        """
        check_fields(self)
        require(is_integer(self.padding) and self.padding >= 0, "padding", self.padding, "an integer of zero or more")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Return the changed images, `(N, C, H, W)`.

        Args:
            images: Images `(N, C, H, W)`.
            generator: Random number generator on the device of the images.
        """
        count, _, height, width = images.shape
        if self.flip:
            flipped = torch.rand(count, generator=generator, device=images.device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if not self.padding:
            return images
        padded = F.pad(images, (self.padding,) * 4)
        top, left = torch.randint(
            2 * self.padding + 1, (2, count, 1), generator=generator, device=images.device
        ).unbind()
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        batch = torch.arange(count, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def augment_pair(
    augmentation: Augmentation, images: Tensor, static: Tensor | None, generator: Generator
) -> tuple[Tensor, Tensor | None]:
    """Change images and their static adversarial examples alike.

    Args:
        augmentation: The random change.
        images: Clean images `(N, C, H, W)`.
        static: Adversarial examples of the same images, `(N, C, H, W)`, or None.
        generator: Random number generator on the device of the images.
    """
    if static is None:
        return augmentation(images, generator), None
    both = augmentation(torch.cat([images, static], dim=1), generator)
    changed, attacked = both.chunk(2, dim=1)
    return changed.contiguous(), attacked.contiguous()

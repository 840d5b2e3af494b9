"""Generator of AdvEncoder, which maps fixed noise to one image-sized pattern."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

_NOISE = 100  # number of entries of one noise vector


class PatternGenerator(nn.Module):
    """DCGAN generator whose batch of patterns is mixed into one pattern.

    Fixed noise `(latents, 100)` passes through five transposed convolutions with BatchNorm and ReLU. The first has an
    output of a sixteenth of the image size, and each of the other four doubles the size. The last is followed by tanh,
    and a 1x1 convolution over the batch axis mixes the patterns into one. For images of 64x64 and `width=1024` this is
    the published generator. For other sizes the pattern is cropped to the image around its centre.

    Args:
        channels: Number of channels of the images.
        size: Size `(height, width)` of the images.
        width: Number of channels of the first layer, which every further layer halves.
        latents: Number of noise vectors.

    References:
        Radford et al., DCGAN, ICLR 2016, arXiv 1511.06434; Zhou et al., ICCV 2023, arXiv 2307.12280.
    """

    noise: Tensor

    def __init__(self, *, channels: int, size: tuple[int, int], width: int, latents: int) -> None:
        super().__init__()
        self.size = size
        start = (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
        widths = [width, width // 2, width // 4, width // 8]
        layers: list[nn.Module] = [nn.ConvTranspose2d(_NOISE, width, start, bias=False)]
        for wide, narrow in pairwise(widths):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Conv2d(latents, 1, 1)
        self.register_buffer("noise", torch.randn(latents, _NOISE, 1, 1))

    def forward(self) -> Tensor:
        """Return the pattern `(1, C, H, W)` in (-1, 1), bounded by a tanh so that every entry has a gradient."""
        patterns = self.layers(self.noise)
        height, width = self.size
        top, left = (patterns.shape[2] - height) // 2, (patterns.shape[3] - width) // 2
        patterns = patterns[:, :, top : top + height, left : left + width]
        return torch.tanh(self.mix(patterns.transpose(0, 1))).transpose(0, 1)

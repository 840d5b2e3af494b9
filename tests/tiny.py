"""A tiny encoder, separable data, and what encoder tests ask of any encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zepad.encoders import Encoder, Preprocessing


class TinyEncoder(nn.Module):
    """Images `(N, 3, H, W)` to features `(N, width)`, with BatchNorm and well under 2,000 parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv(x)).relu()).relu().mean((2, 3))


def toy_data(count: int = 96, classes: int = 3, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is the brightest colour channel, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.rand(count, 3, size, size, generator=generator) * 0.4 + 0.1
    images[torch.arange(count), labels] += 0.4
    return images.clamp(0, 1), labels


@torch.no_grad()
def features(encoder: Encoder, images: Tensor) -> Tensor:
    """What an encoder says in evaluation mode."""
    result: Tensor = encoder.eval()(images)
    return result


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images as a bare backbone expects them, resize aside."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std

"""A tiny encoder and classifier, separable data, and small helpers of the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zepad.encoders import Encoder, Preprocessing
from zepad.ensemble import BranchEnsemble


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


def trained_classifier() -> nn.Module:
    """A classifier that knows 24 toy images of 8x8 pixels, in evaluation mode."""
    torch.manual_seed(0)
    model, (images, labels) = nn.Sequential(TinyEncoder(), nn.Linear(8, 3)), toy_data(24, size=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def colour_ensemble() -> BranchEnsemble:
    """Three branches that know the toy images' classes by their mean colours, each sure to another degree."""
    branches = {}
    for name, scale in (("one", 9.0), ("two", 5.0), ("benign", 4.0)):
        branches[name] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        with torch.no_grad():
            branches[name][2].weight.copy_(scale * torch.eye(3))
            branches[name][2].bias.zero_()
    return BranchEnsemble(branches, threshold=0.05)


def assert_close(actual: Tensor, expected: object, tolerance: float = 1e-10) -> None:
    """Compare two tensors up to one relative and absolute tolerance."""
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norms(delta: Tensor, norm: str) -> Tensor:
    """The L-infinity or L2 norm of the perturbation of each image, `(N,)`."""
    rows = delta.flatten(1)
    return rows.abs().amax(dim=1) if norm == "linf" else rows.norm(dim=1)


@torch.no_grad()
def features(encoder: Encoder, images: Tensor) -> Tensor:
    """Features of an encoder in evaluation mode."""
    result: Tensor = encoder.eval()(images)
    return result


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised images, as a bare backbone expects them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std

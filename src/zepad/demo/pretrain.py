"""Make the two encoders that ship with zepad, without a single label: `python -m zepad.demo.pretrain OUT`.

SimCLR and Barlow Twins are trained on the training half of the digits and stand for the public encoders that a user
would download. Training takes about five minutes on two cores. Labels are used only for the linear probe at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import digits
from ..encoders import SmallResNet

EPOCHS, BATCH, PEAK_LR = 60, 256, 3e-3


def augment(images: Tensor) -> Tensor:
    """Return a random affine view of each image with random contrast, tint and noise."""
    n = len(images)

    def uniform(scale: float) -> Tensor:
        return (torch.rand(n) * 2 - 1) * scale

    angle, zoom, shear = uniform(0.35), 1 + uniform(0.25), uniform(0.3)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    affine = torch.stack(
        [torch.stack([cos, shear - sin, uniform(0.2)], 1), torch.stack([sin, cos, uniform(0.2)], 1)], 1
    )
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)
    contrast = 0.6 + 0.8 * torch.rand(n, 1, 1, 1)
    tint = 0.3 * (torch.rand(n, 3, 1, 1) - 0.5)
    return (views * contrast + tint + 0.05 * torch.randn_like(views)).clamp(0, 1)


def simclr_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent at temperature 0.2 (Chen et al., ICML 2020, arXiv 2002.05709)."""
    rows = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (rows @ rows.T / 0.2).fill_diagonal_(-torch.inf)
    n = len(first)
    partner = torch.cat([torch.arange(n) + n, torch.arange(n)])
    return F.cross_entropy(similarity, partner)


def barlow_twins_loss(first: Tensor, second: Tensor) -> Tensor:
    """Barlow Twins loss with off-diagonal weight 5e-3 (Zbontar et al., ICML 2021, arXiv 2103.03230)."""
    first, second = ((z - z.mean(0)) / z.std(0) for z in (first, second))
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.pow(2).sum() - diagonal.pow(2).sum()
    return (diagonal - 1).pow(2).sum() + 5e-3 * off_diagonal


METHODS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "digits-simclr": (simclr_loss, 128, 0),
    "digits-barlow-twins": (barlow_twins_loss, 256, 1),
}
"""Loss, width of the projector's output and seed of each encoder."""


def pretrain(name: str, images: Tensor) -> SmallResNet:
    """Pre-train one encoder on unlabelled images `(N, 3, 32, 32)` in [0, 1]."""
    loss_function, outputs, seed = METHODS[name]
    torch.manual_seed(seed)
    encoder = SmallResNet(width=16)
    projector = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, outputs))
    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=1e-4)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            views = (projector(encoder((augment(images[index]) - 0.5) / 0.5)) for _ in range(2))
            loss = loss_function(*views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def linear_probe(encoder: SmallResNet) -> float:
    """Return the test accuracy of a linear classifier on the frozen features, in [0, 1]."""
    train, test = digits("train"), digits("test")
    with torch.no_grad():
        features, held_out = (encoder((data.images - 0.5) / 0.5) for data in (train, test))
    mean, std = features.mean(0), features.std(0) + 1e-6
    probe = nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(probe((features - mean) / std), train.labels).backward()
        optimizer.step()
    with torch.no_grad():
        return float((probe((held_out - mean) / std).argmax(1) == test.labels).float().mean())


def main(folder: Path) -> None:
    """Write both encoders in half precision and report their linear probes as stored."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in METHODS:
        encoder = pretrain(name, digits("train").images)
        stored = {k: v.half() if v.is_floating_point() else v for k, v in encoder.state_dict().items()}
        save_file(
            stored,
            folder / f"{name}.safetensors",
            metadata={"method": name, "data": "digits train, unlabelled"},
        )
        encoder.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
        sys.stdout.write(f"{name}: linear probe {linear_probe(encoder):.1%}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

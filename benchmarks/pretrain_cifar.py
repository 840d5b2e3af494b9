"""Pre-train two ResNet-18 without labels on CIFAR-10, by SimCLR and Barlow Twins: encoders for `baselines.py`.

    python benchmarks/pretrain_cifar.py --out encoders --epochs 200 --device cuda
    python benchmarks/baselines.py train --setting resnet18 --encoders encoders --out runs/resnet18

This is a GPU's work. `--data digits --images 64 --epochs 1` proves on a CPU, without a download, that it runs. Labels
serve only for the linear probe that is printed at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import MIRROR_HELP, cifar_resnet18, load_images
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zepad.demo.pretrain import barlow_twins_loss, simclr_loss

METHODS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "simclr": (simclr_loss, 128, 0),
    "barlow-twins": (barlow_twins_loss, 1024, 1),
}
BATCH, PEAK_LR = 512, 3e-3


def views(images: Tensor) -> Tensor:
    """Return a random crop, flip, colour shift and greying of each image, on its device."""
    n, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, device=device)

    scale = uniform(0.2, 1).sqrt()
    flip = (torch.rand(n, device=device) < 0.5).float() * 2 - 1
    zero = torch.zeros(n, device=device)
    x, y = (uniform(-1, 1) * (1 - scale) for _ in range(2))
    affine = torch.stack([torch.stack([scale * flip, zero, x], 1), torch.stack([zero, scale, y], 1)], 1)
    cropped = F.grid_sample(images, F.affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)
    brightness, contrast, saturation = (uniform(0.6, 1.4).view(-1, 1, 1, 1) for _ in range(3))
    tinted = cropped * brightness * (0.8 + 0.4 * torch.rand(n, 3, 1, 1, device=device))
    mean = tinted.mean((1, 2, 3), keepdim=True)
    contrasted = mean + (tinted - mean) * contrast
    grey = contrasted.mean(1, keepdim=True)
    greyed = (torch.rand(n, 1, 1, 1, device=device) < 0.2).float()
    saturated = grey + (contrasted - grey) * saturation * (1 - greyed)
    return saturated.clamp(0, 1)


def pretrain(method: str, images: Tensor, *, epochs: int) -> nn.Module:
    """Pre-train one encoder on unlabelled images `(N, 3, 32, 32)` in [0, 1], on their device."""
    loss_function, outputs, seed = METHODS[method]
    torch.manual_seed(seed)
    encoder = cifar_resnet18().to(images.device)
    projector = nn.Sequential(nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, outputs)).to(
        images.device
    )
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=PEAK_LR, weight_decay=1e-4)
    size = min(BATCH, len(images))
    batches = len(images) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(images), device=images.device)[: batches * size].split(size):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                first, second = (projector(encoder((views(images[index]) - 0.5) / 0.5)) for _ in range(2))
            loss = loss_function(first.float(), second.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def probe(encoder: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the test accuracy of a linear classifier on the frozen features, in [0, 1]."""

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder((chunk - 0.5) / 0.5).float() for chunk in images.split(500)])

    rows, held_out = features(train[0]), features(test[0])
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    classifier = nn.Linear(rows.shape[1], 10).to(rows.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(classifier((rows - mean) / std), train[1]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((classifier((held_out - mean) / std).argmax(1) == test[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--images", type=int, help="number of training images, and of test images, at most")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = {s: load_images(args.data, s, shared=args.shared, limit=args.images) for s in ("train", "test")}
    train, test = ((d.images.to(args.device), d.labels.to(args.device)) for d in data.values())
    for method in METHODS:
        start = time.perf_counter()
        encoder = pretrain(method, train[0], epochs=args.epochs)
        weights = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
        save_file(weights, args.out / f"resnet18-{method}.safetensors")
        seconds = time.perf_counter() - start
        print(f"{method}: linear probe {probe(encoder, train, test):.1%}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

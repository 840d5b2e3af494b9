"""Pre-train two encoders without labels on CIFAR-10, by SimCLR and Barlow Twins.

    python benchmarks/pretrain_cifar.py --encoder resnet20 --epochs 16 --out encoders
    python benchmarks/pretrain_cifar.py --encoder resnet18 --epochs 200 --device cuda --out encoders

Each encoder is written as safetensors, with its recipe and the accuracy of a linear probe beside it in JSON. A run that
was cut goes on at its last epoch. Labels serve only for the linear probe. The ResNet-20s of `benchmarks/encoders` were
made by the first command; ResNet-18s are a GPU's work. `--data digits --images 64 --epochs 1` proves on a CPU, without
a download, that the script runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import ARCHITECTURES, HALF, MIRROR_HELP, load_images
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zepad.demo.pretrain import barlow_twins_loss, simclr_loss
from zepad.modes import autocast

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"simclr": simclr_loss, "barlow-twins": barlow_twins_loss}
OUTPUTS = {"simclr": 128, "barlow-twins": 1024}  # the loss of Barlow Twins wants many


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe:
    """What an encoder was pre-trained with.

    Attributes:
        method: `"simclr"` or `"barlow-twins"`.
        encoder: `"resnet18"` or `"resnet20"`.
        data: Name of the data set.
        images: Number of images.
        epochs: Number of passes over the images.
        batch_size: Number of images per update, of which each gives two views.
        peak_lr: Highest rate of AdamW in the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        hidden: Width of the projector's hidden layer.
        seed: Seed of initialisation, order and views.
    """

    method: str
    encoder: str
    data: str
    images: int
    epochs: int
    batch_size: int = 256
    peak_lr: float = 3e-3
    weight_decay: float = 1e-4
    hidden: int = 1024
    seed: int = 0


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


def pretrain(recipe: PretrainingRecipe, images: Tensor, kept: Path) -> nn.Module:
    """Pre-train one encoder on unlabelled images, or go on with a run that was cut.

    Args:
        recipe: How to train.
        images: Images `(N, 3, 32, 32)` in [0, 1], on the device to train on.
        kept: File that has the state after the last epoch, written after each.
    """
    torch.manual_seed(recipe.seed)
    encoder, features = ARCHITECTURES[recipe.encoder]()
    projector = nn.Sequential(
        nn.Linear(features, recipe.hidden),
        nn.BatchNorm1d(recipe.hidden),
        nn.ReLU(),
        nn.Linear(recipe.hidden, OUTPUTS[recipe.method]),
    )
    model = nn.ModuleDict({"encoder": encoder, "projector": projector}).to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    size = min(recipe.batch_size, len(images))
    batches = len(images) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_lr, total_steps=recipe.epochs * batches)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begun = 0
    if kept.exists():
        state = torch.load(kept, map_location=images.device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(
                f"{kept} was begun with another recipe, {state['recipe']}. Delete it, or ask for the same."
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        begun = state["epoch"]
    for epoch in range(begun, recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch)  # so that a resumed run draws what an uncut one does
        start, total = time.perf_counter(), 0.0
        for index in torch.randperm(len(images), device=images.device)[: batches * size].split(size):
            with autocast(images.device, "auto"):
                first, second = (projector(encoder((views(images[index]) - HALF) / HALF)) for _ in range(2))
            loss = LOSSES[recipe.method](first.float(), second.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"{recipe.method}: epoch {epoch + 1}, loss {total / batches:.3f}, {seconds:.0f} s", flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        written = kept.with_suffix(".writing")
        torch.save({**state, "epoch": epoch + 1, "recipe": asdict(recipe)}, written)
        written.replace(kept)
    return encoder.eval()


def probe(encoder: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the test accuracy of a linear classifier on the frozen features, in [0, 1]."""

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder((chunk - HALF) / HALF).float() for chunk in images.split(500)])

    rows, held_out = features(train[0]), features(test[0])
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    torch.manual_seed(0)
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
    parser.add_argument("--encoder", choices=ARCHITECTURES, default="resnet20")
    parser.add_argument("--methods", nargs="*", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--images", type=int, help="number of training images, and of test images, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data = {s: load_images(args.data, s, shared=args.shared, limit=args.images) for s in ("train", "test")}
    train, test = ((d.images.to(args.device), d.labels.to(args.device)) for d in data.values())
    for method in args.methods:
        recipe = PretrainingRecipe(
            method=method,
            encoder=args.encoder,
            data=args.data,
            images=len(train[0]),
            epochs=args.epochs,
            seed=list(LOSSES).index(method),
        )
        file = args.out / f"{args.encoder}-{method}.safetensors"
        encoder = pretrain(recipe, train[0], file.with_suffix(".pt"))
        save_file({k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}, file)
        accuracy = round(100 * probe(encoder, train, test), 1)
        record = {**asdict(recipe), "linear probe, % of test images": accuracy}
        file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{method}: linear probe {accuracy} %", flush=True)


if __name__ == "__main__":
    main()

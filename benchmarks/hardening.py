"""What makes one hardened branch robust: variants of the training, scored on images held out of the training set.

    python benchmarks/hardening.py --data digits --eps 25 --seeds 0 1 2
    python benchmarks/hardening.py --data cifar10 --images 10000 --eps 8 --only default ...

One JSON line per variant and seed: benign and white-box accuracy (PGD-20, cross-entropy and margin) of the branch with
the head trained along, with a head refitted on clean features, and with one refitted on clean and attacked features.
The loop is this script's own, to compare what the library does not offer; its default is the library's.
On digits a fifth of the training images is held out; on CIFAR-10, whose public encoders saw all training images, the
second half of the test images serves as validation set and is used for no other number.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import MIRROR_HELP, benign, load_encoders, part, split, white_box
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zepad import HeadConfig
from zepad.attacks import PGD, FeaturePGD
from zepad.data import LabelledImages
from zepad.functional import kl_divergence, structure_loss
from zepad.modes import evaluating
from zepad.modules import Branch, MLPHead
from zepad.training import fit_heads


@dataclass(frozen=True)
class Variant:
    """The settings of one way to train."""

    updates: int = 300
    lr: float = 2e-3
    head_lr: float = 2e-3
    steps: int = 5
    structure: float = 1.0
    clean: float = 0.0  # weight of the cross-entropy on clean images; attacked ones have the rest of one
    trades: float = 0.0  # beta; at zero the loss is cross-entropy on attacked images
    average: float = 0.0  # decay of the exponential moving average of the weights
    shift: int = 0  # random translation in pixels
    smoothing: float = 0.0
    batch_norm: str = "adversarial"  # or "frozen", or "joint": attacked and clean images in one batch


VARIANTS = {
    "default": Variant(),
    "a third of the updates": Variant(updates=100),
    "three times the updates": Variant(updates=900),
    "2 inner steps": Variant(steps=2),
    "10 inner steps": Variant(steps=10),
    "rate 5e-4": Variant(lr=5e-4),
    "rate 4e-3": Variant(lr=4e-3),
    "no structure loss": Variant(structure=0.0),
    "structure weight 10": Variant(structure=10.0),
    "half clean cross-entropy": Variant(clean=0.5),
    "TRADES, beta 6": Variant(trades=6.0),
    "weight averaging 0.99": Variant(average=0.99),
    "random shifts of 2 pixels": Variant(shift=2),
    "label smoothing 0.1": Variant(smoothing=0.1),
    "BatchNorm frozen": Variant(batch_norm="frozen"),
    "BatchNorm joint": Variant(batch_norm="joint"),
}
BATCH = 128


def train(encoder: nn.Module, data: LabelledImages, variant: Variant, eps: float, seed: int) -> tuple[Branch, Branch]:
    """Return the branch as it was trained, and its moving average (the same where there is none)."""
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder)
    features = encoder(data.images[:2]).shape[1]
    branch = Branch(encoder, MLPHead(features, len(data.classes))).requires_grad_(True)
    average = copy.deepcopy(branch)
    groups = [(branch.encoder.parameters(), variant.lr), (branch.head.parameters(), variant.head_lr)]
    optimizer = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in groups], weight_decay=8e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, variant.updates)
    generator = torch.Generator().manual_seed(seed)
    attack = PGD(eps=eps, steps=variant.steps, step_size=2 * eps / variant.steps if variant.steps > 1 else eps)
    rows = torch.randperm(len(data)).split(BATCH)
    position = 0
    for update in range(variant.updates):
        if position == len(rows):
            rows, position = torch.randperm(len(data)).split(BATCH), 0
        images, labels = shifted(data.images[rows[position]], variant.shift), data.labels[rows[position]]
        position += 1
        with torch.autocast("cpu", torch.bfloat16):
            branch.eval()
            inner = attack
            targets: Tensor = labels
            if variant.trades:
                with torch.no_grad():
                    targets = branch(images).float()
                inner = replace(attack, loss_fn=lambda z, t: kl_divergence(logits=z.float(), target=t))
            attacked = inner(branch, images, targets, generator=generator)
            if variant.batch_norm != "frozen":
                branch.train()
            else:
                branch.head.train()
            loss = objective(branch, images, attacked, labels, variant)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(variant.average, (1 + update) / (10 + update))
        with torch.no_grad():
            for kept, new in zip(average.state_dict().values(), branch.state_dict().values(), strict=True):
                kept.copy_(kept.lerp(new, 1 - decay) if kept.is_floating_point() else new)
    return branch.eval().requires_grad_(False), average.eval().requires_grad_(False)


def objective(branch: Branch, images: Tensor, attacked: Tensor, labels: Tensor, variant: Variant) -> Tensor:
    """Return the loss of one batch."""
    if variant.trades:
        clean, adversarial = branch(images).float(), branch(attacked).float()
        robust = kl_divergence(logits=adversarial, target=clean).mean()
        return F.cross_entropy(clean, labels) + variant.trades * robust
    if variant.batch_norm == "joint":
        both = branch(torch.cat([attacked, images])).float()  # the clean ones only move the statistics
        return F.cross_entropy(both[: len(images)], labels)
    features = branch.encoder(attacked)
    loss = F.cross_entropy(branch.head(features).float(), labels, label_smoothing=variant.smoothing)
    if variant.structure:
        with evaluating(branch), torch.no_grad():
            benign_features = branch.encoder(images)
        term = structure_loss(adversarial=features.float(), benign=benign_features.float())
        loss = loss + variant.structure * term / len(images)
    if variant.clean:
        loss = (1 - variant.clean) * loss + variant.clean * F.cross_entropy(branch(images).float(), labels)
    return loss


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Translate each image by up to some pixels, repeating the border."""
    if not pixels:
        return images
    size = images.shape[-1]
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * pixels + 1, (len(images), 2)).tolist()
    return torch.stack([padded[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(corners)])


def refitted(branch: Branch, data: LabelledImages, attacked: Tensor | None) -> Branch:
    """The same encoder with a fresh head, fitted on clean features, or on clean and attacked ones."""
    images = data.images if attacked is None else torch.cat([data.images, attacked])
    labels = data.labels if attacked is None else torch.cat([data.labels, data.labels])
    loader = DataLoader(LabelledImages(images, labels, data.classes), batch_size=500)
    classes = len(data.classes)
    heads = fit_heads(
        {"encoder": branch.encoder}, loader, HeadConfig(), channels=3, num_classes=classes, progress=False
    )
    return Branch(branch.encoder, heads["encoder"]).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--images", type=int, help="number of training images; all by default")
    parser.add_argument("--val-images", type=int, default=500, help="number of validation images of CIFAR-10")
    parser.add_argument("--eps", type=float, default=25, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--updates", type=int, help="number of updates, in place of 300")
    options = parser.parse_args()
    torch.set_num_threads(1)
    eps = options.eps / 255
    public = load_encoders(options.data, options.shared)[0]
    for seed in options.seeds:
        data, held_out, _ = split(options.data, options.shared, options.images, seed)
        if options.data == "cifar10":
            held_out = part(held_out, torch.arange(options.val_images))
        for name in options.only:
            variant = VARIANTS[name]
            if options.updates:
                variant = replace(variant, updates=options.updates * variant.updates // 300)
            start = time.perf_counter()
            branch, average = train(public, data, variant, eps, seed)
            seconds = time.perf_counter() - start
            branch = average if variant.average else branch
            feature_attack = FeaturePGD(eps=eps, steps=10, step_size=eps / 4)
            generator = torch.Generator().manual_seed(seed)
            attacked = torch.cat(
                [feature_attack(branch.encoder, chunk, generator=generator) for chunk in data.images.split(500)]
            )
            heads = {
                "trained": branch,
                "clean": refitted(branch, data, None),
                "clean and attacked": refitted(branch, data, attacked),
            }
            found = {
                head: [
                    round(100 * benign(m, held_out.images, held_out.labels), 1),
                    round(100 * white_box(m, held_out.images, held_out.labels, eps), 1),
                ]
                for head, m in heads.items()
            }  # fmt: skip
            record = {"data": options.data, "images": len(data), "variant": name, "seed": seed, **found}
            print(json.dumps({**record, "updates": variant.updates, "seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()

"""What training against attacks on the public encoders keeps, and against whom.

    python benchmarks/public_defense.py --setting digits --out runs/public-digits
    python benchmarks/public_defense.py --setting cifar --out runs/public-cifar

Victim and auxiliary are hardened by `restoration()`, with and without adversaries of their own; the benign branch is
the public auxiliary with a head. Attackers: the six of the paper's threat model on the public victim; feature PGD on
both public encoders; feature PGD on both hardened encoders ("published"); PGD on the logits of the whole model
("white-box").
Banks and epochs are kept in the folder, so that a run that was cut goes on; the results are written as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import MIRROR_HELP, add_universal, benign, header, load_encoders, load_images, row, universal, white_box
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from zepad import BenignConfig, Encoder, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import FeaturePGD
from zepad.evaluation import semi_black_box, semi_black_box_plus
from zepad.fusion import Bounded
from zepad.modules import Branch
from zepad.objectives import restoration
from zepad.training import fit_heads


@dataclass(frozen=True)
class Setting:
    """The data, encoders and budgets of one table."""

    data: str
    encoders: str
    train_images: int | None
    attacked_images: int | None
    benign_images: int
    attacker_images: int
    eps: float


SETTINGS = {
    "digits": Setting("digits", "digits", None, None, 497, 1300, 25 / 255),
    "cifar": Setting("cifar10", "cifar", 10_000, 300, 5000, 500, 8 / 255),
    "tiny": Setting("digits", "digits", 64, 16, 16, 16, 25 / 255),  # proves that the script runs
}
METHODS = {"restoration": None, "restoration, own eps/2": 0.5, "restoration, own eps": 1.0}
"""Radius of the own adversaries in training as a share of eps, by the name of the method; None does without."""

VOTES = (0.0, 1.0, 2.0)


class Bench:
    """Data, public encoders, and what attackers crafted on these once for every model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting, self.seed, self.folder = SETTINGS[args.setting], args.seed, args.out / f"seed-{args.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.epochs: int | None = args.epochs
        self.universal = args.universal
        self.train = load_images(self.setting.data, "train", shared=args.shared, limit=self.setting.train_images)
        self.test = load_images(self.setting.data, "test", shared=args.shared, limit=self.setting.benign_images)
        self.public: tuple[Encoder, Encoder] = load_encoders(self.setting.encoders, args.shared)
        torch.manual_seed(self.seed)
        self.loader = DataLoader(self.train, batch_size=128, shuffle=True)
        count = self.setting.attacked_images
        self.images, self.labels = self.test.images[:count], self.test.labels[:count]

    def crafted(self) -> dict[str, Tensor]:
        """Return the images that each attacker made of the test images with the public encoders."""
        file = self.folder / "attacked.pt"
        if not file.exists():
            common = {"eps": self.setting.eps, "seed": self.seed, "progress": False}
            surrogate = Subset(self.train, range(min(len(self.train), self.setting.attacker_images)))
            loader = DataLoader(surrogate, batch_size=128, shuffle=True)
            attacks = universal(self.universal, eps=self.setting.eps, seed=self.seed)
            attackers = [
                *semi_black_box(self.public[0], loader, universal=attacks, **common),
                *semi_black_box_plus(*self.public, loader, universal={}, **common),
            ]
            torch.save({a.name: self.attacked(a.attack, a.target(None)) for a in attackers}, file)
        return torch.load(file, weights_only=True)

    def attacked(self, attack: object, target: object) -> Tensor:
        """Return the test images under an attack."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.arange(len(self.labels)).split(250)
        return torch.cat([attack(target, self.images[c], self.labels[c], generator=generator) for c in rows])

    def score(self, model: nn.Module, hardened: list[nn.Module]) -> dict[str, float]:
        """Return every accuracy of one model, in per cent."""
        victim_only = {name: x for name, x in self.crafted().items() if "both" not in name}
        both = next(x for name, x in self.crafted().items() if "both" in name)
        known = {name: benign(model, x, self.labels) for name, x in victim_only.items()}
        published = self.attacked(FeaturePGD(eps=self.setting.eps, steps=20), hardened)
        scores = {
            "benign": benign(model, self.test.images, self.test.labels),
            **known,
            "worst of six": min(known.values()),
            "both encoders": benign(model, both, self.labels),
            "published": benign(model, published, self.labels),
            "white-box": white_box(model, self.images, self.labels, self.setting.eps),
        }
        return {name: round(100 * value, 2) for name, value in scores.items()}

    def undefended(self) -> dict[str, dict[str, float]]:
        """Score the public encoders with heads."""
        named = dict(zip(("public victim", "public auxiliary"), self.public, strict=True))
        heads = fit_heads(named, self.loader, HeadConfig(seed=self.seed), channels=3, num_classes=10, progress=False)
        return {name: self.score(Branch(named[name], heads[name]).eval(), list(self.public)) for name in named}

    def defended(self, name: str) -> dict[str, dict[str, float]]:
        """Train by one method and score every vote of the benign branch."""
        start, own = time.perf_counter(), METHODS[name]
        defense = ZePAD.from_encoders(*self.public, benign=self.public[1], num_classes=10, fusion=Bounded(vote=0.0))
        config = HardenConfig(eps=self.setting.eps, seed=self.seed, epochs=self.epochs)
        defense.harden(
            self.loader,
            config,
            objective=restoration(own_eps=None if own is None else own * self.setting.eps),
            checkpoint_dir=self.folder / name.replace("/", " by "),
            bank_dir=self.folder / "banks",
            resume=True,
            progress=False,
        )
        seconds = time.perf_counter() - start
        defense.fit_benign(self.loader, BenignConfig(freeze_encoder=True, seed=self.seed), progress=False)
        hardened = [defense.encoder("victim"), defense.encoder("auxiliary")]
        rows = {}
        for vote in VOTES:
            defense.configure(fusion=Bounded(vote=vote))
            rows[f"{name}, vote {vote:g}"] = {**self.score(defense, hardened), "training seconds": round(seconds)}
        return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table."""
    columns = ("benign", "worst of six", "both encoders", "published", "white-box", "training seconds")
    lines = [*header("per cent", *columns)]
    lines += [row(name, *(str(scores.get(column, "")) for column in columns)) for name, scores in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    add_universal(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS)[:2])
    parser.add_argument("--epochs", type=int, help="number of epochs of hardening, in place of the recipes' own")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    file = bench.folder / "results.json"
    rows: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else bench.undefended()
    for name in args.methods:
        if f"{name}, vote 0" not in rows:
            rows |= bench.defended(name)
        file.write_text(json.dumps(rows, indent=1))
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()

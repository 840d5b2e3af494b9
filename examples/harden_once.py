"""Harden two encoders once, without a label, and defend several tasks by heads alone.

python examples/harden_once.py
python examples/harden_once.py --limit 200 --epochs 1 --test-limit 40      # in a minute, to see that it runs

The images are handwritten digits. They are hardened on as images without labels; the tasks come afterwards: which digit
it is, whether it is even, whether it is below five. The attacker knows the public encoders and no task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import FeaturePGD
from zepad.data import digits
from zepad.modules import Branch
from zepad.training import fit_heads

EPS = 25 / 255
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "which digit": lambda digit: digit,
    "even or odd": lambda digit: digit % 2,
    "below five": lambda digit: (digit < 5).long(),
}


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """Return the share of right predictions."""
    return round(float((predicted == expected).float().mean()), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=650, help="number of training images")
    parser.add_argument("--test-limit", type=int, default=250, help="number of attacked images")
    parser.add_argument("--epochs", type=int, help="passes of hardening; by default as many as the recipe wants")
    options = parser.parse_args()
    train, test = digits("train"), digits("test")
    images, held_out = train.images[: options.limit], test.images[: options.test_limit]

    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    public = defense.encoder("victim")
    undefended, both = {"victim": public}, [public, defense.encoder("auxiliary")]
    attack = FeaturePGD(eps=EPS, steps=30, momentum=1.0, diversity=0.5)
    attacked = attack(both, held_out, generator=torch.Generator().manual_seed(0))
    unlabelled = DataLoader(TensorDataset(images), batch_size=64, shuffle=True)
    defense.harden(unlabelled, HardenConfig(eps=EPS, epochs=options.epochs), progress=False)

    for task, labels_of in TASKS.items():
        labels = labels_of(train.labels[: options.limit])
        loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
        if defense.stage == "hardened":
            defense.fit_benign(loader, BenignConfig(freeze_encoder=True), progress=False)
        else:
            defense.fit_heads(loader, progress=False)
        heads = fit_heads(
            undefended, loader, HeadConfig(), channels=3, num_classes=len(labels.unique()), progress=False
        )
        plain, expected = Branch(public, heads["victim"]).eval(), labels_of(test.labels[: options.test_limit])
        found: dict[str, dict[str, float]] = {"undefended": {}, "ZePAD": {}}
        for name, seen in (("benign", held_out), ("attacked", attacked)):
            with torch.no_grad():
                found["undefended"][name] = accuracy(plain(seen).argmax(1), expected)
            found["ZePAD"][name] = accuracy(defense.predict(seen), expected)
        print(json.dumps({"task": task, **found}), flush=True)


if __name__ == "__main__":
    main()

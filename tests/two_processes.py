"""What each process of test_distributed runs: harden, fit and save a tiny defense, and write its accuracies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.evaluation import accuracy
from zepad.objectives import DAEMixture, gen_af, static_adversarial_training

OBJECTIVES = {
    "two stages": gen_af(probes=16, adaptation_epochs=2),  # the second trains the same branch once more
    "static": static_adversarial_training(static=DAEMixture(steps=1)),  # one process crafts, both read
}


def train(out: str | Path, objective: str) -> dict[str, float]:
    """Return the accuracies and the number of processes."""
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(*toy_data()), batch_size=16, shuffle=True)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    config = HardenConfig(epochs=6, steps=1, lr=1e-2, head_lr=1e-2)
    defense.harden(loader, config, objective=OBJECTIVES[objective], progress=False)
    benign = BenignConfig(epochs=6, lr=1e-2, head_lr=1e-2)
    defense.fit_benign(loader, benign, head_config=HeadConfig(epochs=20), progress=False)
    defense.save_pretrained(out)
    test = [toy_data(60, seed=5)]
    branches = {role: accuracy(defense.branch(role), test).rate for role in ("victim", "auxiliary", "benign")}
    return {"processes": PartialState().num_processes, "benign_accuracy": accuracy(defense, test).rate, **branches}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rates = train(*sys.argv[1:])
    if PartialState().is_main_process:
        sys.stdout.write(json.dumps(rates) + "\n")

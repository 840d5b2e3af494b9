"""Harden two encoders on one process or many, with the same calls.

python examples/harden_digits.py --out my-model
accelerate launch --num_processes 2 examples/harden_digits.py --out my-model          # two GPUs
torchrun --nproc_per_node 2 examples/harden_digits.py --out my-model                  # two processes, GPU or CPU

On a machine without a GPU `accelerate launch --num_processes 2 --cpu` starts one process only (accelerate 1.15): use
torchrun there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from torch.utils.data import DataLoader

from zepad import BenignConfig, HardenConfig, ZePAD
from zepad.data import digits, load_data
from zepad.evaluation import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int, help="number of training images; all by default")
    options = parser.parse_args()

    loader = DataLoader(load_data("digits", "train", limit=options.limit), batch_size=128, shuffle=True)
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    defense.harden(loader, HardenConfig(eps=25 / 255, epochs=options.epochs))
    defense.fit_benign(loader, BenignConfig(epochs=options.epochs))
    defense.save_pretrained(options.out)  # the main process writes, the others wait

    if PartialState().is_main_process:
        test = DataLoader(digits("test"), batch_size=250)
        branches = {role: accuracy(defense.branch(role), test).rate for role in ("victim", "auxiliary", "benign")}
        print(
            json.dumps(
                {"processes": PartialState().num_processes, "benign_accuracy": accuracy(defense, test).rate, **branches}
            )
        )


if __name__ == "__main__":
    main()

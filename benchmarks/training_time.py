"""How long hardening takes by default, beside the paper's objective with the default settings of the library.

    python benchmarks/training_time.py --setting digits

Both encoders are hardened by each, one after the other in one process of one thread, the bank of adversarial examples
included. What is compared is the time of the processor, which other programs lengthen less than that of a clock.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import MIRROR_HELP, load_encoders, load_images
from ladder import SETTINGS
from torch.utils.data import DataLoader

from zepad import HardenConfig, ZePAD
from zepad.objectives import zepad_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--images", type=int, help="number of training images at most")
    parser.add_argument("--epochs", type=int, help="number of passes, in place of the recipes' own")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[args.setting]
    wanted = args.images or setting.images
    data = load_images(setting.data, "train", shared=args.shared, size=setting.size, limit=wanted)
    encoders = load_encoders(setting.encoders, args.shared)
    objectives = {"restoration, the default": None, "the paper's objective": zepad_recipe()}
    config = replace(HardenConfig(eps=setting.eps), epochs=args.epochs)
    seconds, epochs = {}, {}
    for name, objective in objectives.items():
        defense = ZePAD.from_encoders(*encoders, num_classes=10)
        loader = DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
        start = time.process_time()
        defense.harden(loader, config, objective=objective, progress=False)
        seconds[name] = round(time.process_time() - start, 1)
        epochs[name] = len(defense.provenance["harden"]["history"]["victim"])
    first, second = seconds.values()
    found = {"setting": args.setting, "images": len(data), "seconds": seconds, "epochs": epochs}
    print(json.dumps({**found, "ratio": round(first / second, 2)}, indent=1))


if __name__ == "__main__":
    main()

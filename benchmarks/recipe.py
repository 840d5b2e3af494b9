"""Which hardening recipe leaves the most: one victim branch, benign and white-box accuracy, one JSON line.

python benchmarks/recipe.py --data digits --eps 25 --set lr=0.002 --set epochs=8
python benchmarks/recipe.py --data cifar10 --images 3000 --eps 8 --set lr=0.002 --set epochs=8
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import MIRROR_HELP, benign, load_encoders, load_images, white_box
from torch.utils.data import DataLoader

from zepad import HardenConfig, HeadConfig, ZePAD
from zepad.encoders import Encoder
from zepad.modules import Branch
from zepad.training import fit_heads, harden_branch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--images", type=int, help="number of training images; all by default")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--eps", type=float, default=25, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--set", action="append", default=[], help="field=value of HardenConfig")
    parser.add_argument("--paper", action="store_true", help="start from HardenConfig.paper()")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    eps = options.eps / 255
    changes = {key: json.loads(value) for key, value in (item.split("=") for item in options.set)}
    config = HardenConfig.paper(**changes) if options.paper else HardenConfig(**{"eps": eps, **changes})
    train = load_images(options.data, "train", shared=options.shared, limit=options.images)
    test = load_images(options.data, "test", shared=options.shared, limit=options.test_images)
    loader = DataLoader(train, batch_size=options.batch, shuffle=True)
    victim, auxiliary = load_encoders(options.data, options.shared)
    model = ZePAD.from_encoders(victim, auxiliary, preset="paper")
    start = time.perf_counter()
    branch, records = harden_branch(model.encoder("victim"), loader, config, num_classes=10, progress=False)
    seconds = time.perf_counter() - start
    encoder: Encoder = branch.encoder
    refitted = fit_heads({"victim": encoder}, loader, HeadConfig(), channels=3, num_classes=10, progress=False)
    record: dict[str, object] = {
        "data": options.data, "images": len(train), "eps": f"{options.eps:g}/255", "paper": options.paper, **changes,
        "batch": options.batch, "epochs": len(records["hardening"]), "seconds": round(seconds),
    }  # fmt: skip
    for name, model in (("adversarial_head", branch), ("refitted_head", Branch(encoder, refitted["victim"]))):
        record[name] = {
            "benign": round(benign(model, test.images, test.labels), 3),
            "white_box": round(white_box(model, test.images, test.labels, eps), 3),
        }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

"""Where the benign (BMP) encoder should start: a copy of the clean auxiliary, fine-tuned, or from scratch. JSON lines.

Each attack is a per-image or universal feature attack crafted on public encoders; the benign branch alone is scored.

python benchmarks/benign_default.py --data digits --eps 25 --seeds 3
python benchmarks/benign_default.py --data imagenette64 --shared PATH --images 3000 --eps 10 --seeds 1
python benchmarks/benign_default.py --data folder:imagenette --images 3000 --eps 10 --seeds 1
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from common import MIRROR_HELP, benign, load_encoders, load_images
from torch import nn
from torch.utils.data import DataLoader

from zepad import BenignConfig, ZePAD
from zepad.attacks import PGD, UniversalFeatureAttack, attack_features
from zepad.encoders import Encoder
from zepad.training import train_benign


def from_scratch(encoder: Encoder, seed: int) -> Encoder:
    """Return the same architecture with fresh weights."""
    torch.manual_seed(seed)
    fresh = copy.deepcopy(encoder)
    for part in fresh.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="digits", help="digits, imagenette64 of a local mirror, or what load_data takes"
    )
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--images", type=int, help="number of training images; all by default")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--eps", type=float, default=25, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    eps = options.eps / 255
    train = load_images(options.data, "train", shared=options.shared, limit=options.images)
    test = load_images(options.data, "test", shared=options.shared, limit=options.test_images)
    loader = DataLoader(train, batch_size=128, shuffle=True)
    model = ZePAD.from_encoders(*load_encoders(options.data, options.shared), preset="paper")
    attacked = {}
    for role in ("victim", "auxiliary"):
        public = model.encoder(role)
        generator = torch.Generator().manual_seed(0)
        pgd = PGD(eps=eps, steps=20, step_size=eps / 8)
        chunks = [attack_features(pgd, public, chunk, generator=generator) for chunk in test.images.split(250)]
        attacked[f"per-image on {role}"] = torch.cat(chunks)
        universal = UniversalFeatureAttack(eps=eps, epochs=3).fit(public, loader)
        attacked[f"universal on {role}"] = universal.apply(test.images)
    starts = {"fine-tuned auxiliary": (1, False), "scratch": (1, True), "scratch, 3x epochs": (3, True)}
    for name, (factor, fresh) in starts.items():
        results: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            encoder = copy.deepcopy(model.encoder("auxiliary"))
            if fresh:
                encoder = from_scratch(encoder, seed)
            config = BenignConfig(seed=seed, epochs=10 * factor, freeze_encoder=False)
            branch: nn.Module = train_benign(encoder, loader, config, num_classes=10, progress=False)[0]
            for column, images in {"benign": test.images, **attacked}.items():
                results.setdefault(column, []).append(benign(branch, images, test.labels))
        record = {
            column: [round(statistics.mean(values), 3), round(statistics.stdev(values), 3) if len(values) > 1 else None]
            for column, values in results.items()
        }
        head = {"data": options.data, "images": len(train), "eps": f"{options.eps:g}/255", "seeds": options.seeds}
        print(json.dumps({**head, "start": name, "mean and deviation": record}), flush=True)


if __name__ == "__main__":
    main()

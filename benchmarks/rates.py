"""Which learning rate keeps an encoder alive while it is hardened: a small ViT, and the packaged SimCLR ResNet.

The ViT is pre-trained here with labels, on the images that both are hardened on. They are scored on test images: a
linear probe on the public encoder, benign and white-box accuracy of the hardened branch.

python benchmarks/rates.py --images 800 --test-images 200 --epochs 8 --steps 1 --seeds 1
"""

from __future__ import annotations

import argparse

import torch
from common import benign, cell, header, part, row, white_box
from torch.utils.data import DataLoader

from zepad import BenignConfig, HardenConfig
from zepad.attacks.universal.probe import fit_probe
from zepad.data import LabelledImages, digits
from zepad.encoders import Encoder
from zepad.encoders.given import as_encoder
from zepad.modules import Branch
from zepad.training import harden_branch, train_benign

RATES = (2e-3, 5e-4, 2e-4, 1e-4)
EPS = 8 / 255


def pretrained_vit(data: LabelledImages, seed: int, epochs: int) -> Encoder:
    """Return a ViT of 0.45 million weights, 17 tokens, trained on images with labels."""
    from timm.models import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    config = BenignConfig(freeze_encoder=False, lr=1e-3, weight_decay=1e-5, epochs=epochs, seed=seed)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    return train_benign(model, loader, config, num_classes=10, progress=False)[0].encoder


def public_accuracy(encoder: Encoder, train: LabelledImages, test: LabelledImages) -> float:
    """Return the accuracy of a linear probe on the encoder as it is."""
    with torch.no_grad():
        probe = fit_probe(encoder.eval()(train.images), train.labels)
    return benign(Branch(encoder, probe), test.images, test.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="number of passes of the hardening")
    parser.add_argument("--pretraining-epochs", type=int, default=40)
    parser.add_argument("--images", type=int, help="number of training images; all by default")
    parser.add_argument("--test-images", type=int, help="number of test images; all by default")
    parser.add_argument("--steps", type=int, default=2, help="steps of the training attack")
    parser.add_argument("--only", choices=("vit", "resnet"), nargs="+", default=("vit", "resnet"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (
        part(digits(split), torch.arange(len(digits(split)))[:count])
        for split, count in (("train", options.images), ("test", options.test_images))
    )
    print("\n".join(header("encoder", "rate", "public, linear probe", "hardened: benign", "white-box")), flush=True)
    for name in options.only:
        makers = {
            "vit": lambda seed: pretrained_vit(train, seed, options.pretraining_epochs),
            "resnet": lambda _: as_encoder("victim", "zepad:digits-simclr"),
        }
        encoders = [makers[name](seed) for seed in range(options.seeds)]
        public = [public_accuracy(encoder, train, test) for encoder in encoders]
        for rate in RATES:
            scores = []
            for seed, encoder in enumerate(encoders):
                config = HardenConfig(lr=rate, eps=EPS, steps=options.steps, epochs=options.epochs, seed=seed)
                loader = DataLoader(train, batch_size=64, shuffle=True)
                branch, _ = harden_branch(encoder, loader, config, num_classes=10, progress=False)
                clean = benign(branch, test.images, test.labels)
                scores.append((clean, white_box(branch, test.images, test.labels, EPS)))
            columns = zip(*scores, strict=True)
            print(row(name, f"{rate:g}", cell(public), *(cell(list(column)) for column in columns)), flush=True)


if __name__ == "__main__":
    main()

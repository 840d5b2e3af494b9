"""Harden two CLIP models without a label, and classify by class names: open_clip end to end.

python examples/clip_zero_shot.py                                        # the embedded digits, minutes on two cores
python examples/clip_zero_shot.py --train cifar10 --test cifar10 --limit 10000 --eps 8   # below ZEPAD_DATA

The two CLIPs are small and trained here, on captions such as "a photo of a {class}.", so that nothing has to be
downloaded. They saw the classes they are asked for: the numbers show what hardening keeps of them, and nothing about
transfer to unseen classes. With public weights, `open_clip.create_model("ViT-B-32", pretrained=...)` takes the place of
`small_clip`, and `--lr 1e-5` suits a large vision transformer.

FARE stands beside the default, which restores the public features under attacks on the public towers. Both leave the
text towers and their classifiers valid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zepad import HardenConfig, ZePAD, ZeroShotHead
from zepad.attacks import APGD
from zepad.data import load_data
from zepad.evaluation import Attacker, evaluate, semi_black_box, semi_black_box_plus
from zepad.objectives import Recipe, fare

TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "this is a {}.")
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
IMAGE = {
    "victim": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
    "auxiliary": {"image_size": 32, "patch_size": 4, "width": 96, "layers": 4, "head_width": 32},
}


def small_clip(role: str) -> nn.Module:
    """Return an untrained open_clip model for 32x32 images: a ResNet or a vision transformer beside a text tower."""
    model: nn.Module = open_clip.CLIP(embed_dim=64, vision_cfg=IMAGE[role], text_cfg=TEXT)
    half = (0.5, 0.5, 0.5)
    open_clip.set_model_preprocess_cfg(model, {"size": (32, 32), "mean": half, "std": half})
    return model


def train_clip(model: nn.Module, images: Tensor, labels: Tensor, captions: Tensor, epochs: int) -> None:
    """Train on pairs of an image and the caption of its class. Captions are `(T, K, tokens)`: templates by classes."""
    loader = DataLoader(TensorDataset(images * 2 - 1, labels), batch_size=128, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch, classes in loader:
            template = captions[int(torch.randint(len(captions), ()))]
            image, text, scale = model(batch, template)[:3]
            optimizer.zero_grad()
            F.cross_entropy(scale * image @ text.T, classes).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train two CLIPs, harden them by two objectives without a label, and attack the zero-shot classifiers."""
    torch.manual_seed(options.seed)
    train = load_data(options.train, "train", size=32, limit=options.limit)
    test = load_data(options.test, "test", size=32, limit=options.test_limit, seed=1)
    images, labels = _all(train)
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    captions = torch.stack([tokenizer([t.format(name) for name in train.classes]) for t in TEMPLATES])
    clips = {role: small_clip(role) for role in ("victim", "auxiliary")}
    for model in clips.values():
        train_clip(model, images, labels, captions, options.clip_epochs)

    heads = {role: ZeroShotHead.from_text(m, tokenizer, train.classes, TEMPLATES) for role, m in clips.items()}
    heads["benign"] = heads["auxiliary"]  # the benign encoder starts as a copy of it
    models: dict[str, nn.Module] = {}
    for name, objective in (("FARE", fare()), ("restoration", None)):  # None: the objective of the default preset
        defense = harden(clips, images, objective, options).fit_zero_shot(heads, class_names=train.classes)
        models |= {f"{name}, hardened victim": defense.branch("victim"), f"{name}, ZePAD": defense}
    undefended, public = defense.branch("reference"), defense.encoder("benign")  # which hardening leaves alone
    clips["victim"].visual.load_state_dict(defense.encoder("victim").backbone.state_dict())  # back into open_clip

    loader, eps = DataLoader(test, batch_size=100), options.eps / 255
    attackers = [
        *semi_black_box(undefended.encoder, loader, eps=eps, universal={}, progress=False),
        *semi_black_box_plus(undefended.encoder, public, loader, eps=eps, universal={}, progress=False),
        Attacker(name="APGD-CE-20", threat_model="white-box", attack=APGD(eps=eps, steps=20)),
    ]
    found: dict[str, Any] = {"data": options.test, "images": len(test), "eps": f"{options.eps:g}/255"}
    for name, model in {"undefended victim": undefended, **models}.items():
        report = evaluate(model, loader, attackers, name=name, data=options.test, sanity=False, progress=False)
        worst = {group: round(result.robust_accuracy.value, 4) for group, result in report.worst.items()}
        found[name] = {"benign": round(report.benign_accuracy.value, 4), **worst}
    return found


def harden(clips: dict[str, nn.Module], images: Tensor, objective: Recipe | None, options: argparse.Namespace) -> ZePAD:
    """Return a defense of two CLIPs, hardened on images without labels."""
    loader = DataLoader(images, batch_size=128, shuffle=True)
    config = HardenConfig(eps=options.eps / 255, epochs=options.epochs, lr=options.lr, seed=options.seed)
    defense = ZePAD.from_encoders(clips["victim"], clips["auxiliary"])
    return defense.harden(loader, config, objective=objective, progress=False)


def _all(data: Any) -> tuple[Tensor, Tensor]:
    batches = list(DataLoader(data, batch_size=500))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="digits", help="training images: a name or file that load_data takes")
    parser.add_argument("--test", default="digits", help="test images: a name or file that load_data takes")
    parser.add_argument("--limit", type=int, help="number of training images; all by default")
    parser.add_argument("--test-limit", type=int, help="number of test images; all by default")
    parser.add_argument("--eps", type=float, default=16, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--lr", type=float, help="learning rate of hardening; by default one that suits the encoder")
    parser.add_argument("--clip-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, help="number of epochs of hardening; by default that of the objective")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(run(parser.parse_args(arguments)), indent=1))


if __name__ == "__main__":
    main()

"""Do our attacks agree with a third party's? APGD-CE, APGD-DLR and Square beside ART's, same model, data and budget.

python benchmarks/attack_agreement.py --data digits --eps 25
python benchmarks/attack_agreement.py --data cifar10 --images 3000 --eps 8 --epochs 3

The model is one hardened victim branch. Prints a Markdown table, then one JSON line. ART's AutoPGD spends all steps on
every image that was right at the start of a restart; ours stops with each image that falls. Both get one restart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import art
import numpy as np
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
from common import MIRROR_HELP, load_encoders, load_images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zepad import HardenConfig, ZePAD
from zepad.attacks import APGD, Square, art_classifier, cross_entropy, dlr
from zepad.modules import Branch, MLPHead
from zepad.training import harden_branch

Craft = Callable[[Tensor, Tensor, int], Tensor]


def hardened(options: argparse.Namespace) -> nn.Module:
    """Return the victim branch after a few epochs of hardening; kept in a file if one is named."""
    torch.manual_seed(0)
    encoder = ZePAD.from_encoders(*load_encoders(options.data, options.shared)).encoder("victim")
    features = encoder(torch.zeros(2, 3, 32, 32)).shape[1]
    if options.keep is not None and options.keep.exists():
        branch = Branch(encoder, MLPHead(features, 10))
        branch.load_state_dict(load_file(options.keep))
        return branch.eval()
    train = load_images(options.data, "train", shared=options.shared, limit=options.images)
    loader = DataLoader(train, batch_size=128, shuffle=True)
    config = HardenConfig(eps=options.eps / 255, epochs=options.epochs)
    branch, _ = harden_branch(encoder, loader, config, num_classes=10, progress=False)
    if options.keep is not None:
        save_file(branch.state_dict(), options.keep)
    return branch.eval()


def pairs(model: nn.Module, eps: float, options: argparse.Namespace) -> dict[str, tuple[Craft, Craft]]:
    """Return, for each attack, ours and ART's."""
    classifier = art_classifier(model, num_classes=10, image_shape=(3, 32, 32))

    def ours(attack: APGD | Square) -> Craft:
        def craft(images: Tensor, labels: Tensor, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            chunks = zip(images.split(options.batch), labels.split(options.batch), strict=True)
            return torch.cat([attack(model, x, y, generator=generator) for x, y in chunks])

        return craft

    def theirs(attack: AutoProjectedGradientDescent | SquareAttack) -> Craft:
        def craft(images: Tensor, labels: Tensor, seed: int) -> Tensor:
            np.random.seed(seed)  # noqa: NPY002 - ART draws from NumPy's global state
            return torch.from_numpy(attack.generate(images.numpy(), np.eye(10, dtype=np.float32)[labels]))

        return craft

    def art_apgd(loss: str) -> AutoProjectedGradientDescent:
        return AutoProjectedGradientDescent(
            classifier, norm=np.inf, eps=eps, eps_step=2 * eps, max_iter=options.steps, nb_random_init=1,
            batch_size=options.batch, loss_type=loss, verbose=False,
        )  # fmt: skip

    art_square = SquareAttack(
        classifier, norm=np.inf, eps=eps, max_iter=options.queries, nb_restarts=1, batch_size=options.batch,
        verbose=False,
    )  # fmt: skip
    return {
        f"APGD-CE, {options.steps} steps": (
            ours(APGD(eps=eps, steps=options.steps, loss_fn=cross_entropy)),
            theirs(art_apgd("cross_entropy")),
        ),
        f"APGD-DLR, {options.steps} steps": (
            ours(APGD(eps=eps, steps=options.steps, loss_fn=dlr)),
            theirs(art_apgd("difference_logits_ratio")),
        ),
        f"Square, {options.queries} queries": (ours(Square(eps=eps, queries=options.queries)), theirs(art_square)),
    }


def survivors(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) for x in images.split(250)]) == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--images", type=int, help="number of training images; all by default")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs of hardening")
    parser.add_argument("--eps", type=float, default=25, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--attacks", nargs="*", help="attacks to run, by the beginnings of their names; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, help="safetensors file of the hardened branch, to skip its training next time"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    eps = options.eps / 255
    model = hardened(options)
    test = load_images(options.data, "test", shared=options.shared, limit=options.test_images)
    images, labels = test.images, test.labels
    record: dict[str, object] = {
        "data": options.data, "eps": f"{options.eps:g}/255", "test_images": len(labels), "seeds": options.seeds,
        "batch": options.batch, "threads": options.threads, "torch": torch.__version__, "art": art.__version__,
        "benign_accuracy": round(float(survivors(model, images, labels).float().mean()), 4),
    }  # fmt: skip
    rows = []
    for name, makers in pairs(model, eps, options).items():
        if options.attacks and not name.startswith(tuple(options.attacks)):
            continue
        accuracies: list[list[float]] = [[], []]
        seconds = [0.0, 0.0]
        together = torch.ones(2, len(labels), dtype=torch.bool)
        for seed in range(options.seeds):
            for who, craft in enumerate(makers):
                start = time.perf_counter()
                attacked = craft(images, labels, seed)
                seconds[who] += time.perf_counter() - start
                assert (attacked - images).abs().max() <= eps + 1e-6
                assert attacked.min() >= 0
                assert attacked.max() <= 1
                holds = survivors(model, attacked, labels)
                accuracies[who].append(float(holds.float().mean()))
                together[who] &= holds
        ours, theirs = (sum(values) / len(values) for values in accuracies)
        each = [1000 * value / options.seeds / len(labels) for value in seconds]
        record[name] = {
            "ours": round(ours, 4), "art": round(theirs, 4),
            "holds_against_ours_alone": int((together[0] & ~together[1]).sum()),
            "holds_against_art_alone": int((together[1] & ~together[0]).sum()),
            "ms_per_image_ours": round(each[0], 2), "ms_per_image_art": round(each[1], 2),
        }  # fmt: skip
        rows.append(f"| {name} | {ours:.1%} | {theirs:.1%} | {each[0]:.1f} | {each[1]:.1f} | {each[1] / each[0]:.2f} |")
        print(json.dumps({name: record[name]}), flush=True)
    print("\n| attack | robust accuracy, ours | ART's | ms per image, ours | ART's | ratio |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows) + "\n")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

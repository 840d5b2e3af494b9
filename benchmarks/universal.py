"""What universal attacks leave of an undefended classifier on the packaged digits encoders, and how long they take.

    python benchmarks/universal.py --eps 40

One seed, 497 test images, the head fitted on the 1,300 training images, which are also the attacker's. Beside them
stands the worst of five random sign patterns of the same budget.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.utils.data import DataLoader

from zepad import HeadConfig
from zepad.attacks import PAPUGS, AdvEncoderPatch, PAPBase, PAPFuse, UniversalFeatureAttack, UniversalPerturbation
from zepad.data import digits
from zepad.encoders import EncoderSpec, build_encoder
from zepad.evaluation import universal_attacks
from zepad.modules import Branch
from zepad.training import fit_heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eps", type=float, default=40, help="radius of the L-infinity ball, in 255ths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encoders", nargs="*", default=["zepad:digits-barlow-twins", "zepad:digits-simclr"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    eps, seed = args.eps / 255, args.seed
    attacks = {
        **universal_attacks(eps=eps, seed=seed),
        "PAP, the paper's first stage": PAPBase(eps=eps, seed=seed, layer="stage1"),
        "PAP fuse": PAPFuse(eps=eps, seed=seed),
        "PAP ugs": PAPUGS(eps=eps, seed=seed),
        "AdvEncoder patch": AdvEncoderPatch(seed=seed),
        "cosine distance": UniversalFeatureAttack(eps=eps, seed=seed),
    }
    train, test = digits("train"), digits("test")
    torch.manual_seed(seed)
    loader = DataLoader(train, batch_size=128, shuffle=True)
    print("| encoder | attack | accuracy left | CPU seconds |\n|---|---|---|---|")
    for name in args.encoders:
        encoder = build_encoder(EncoderSpec.parse(name), pretrained=True)
        heads = fit_heads(
            {"victim": encoder}, loader, HeadConfig(seed=seed), channels=3, num_classes=10, progress=False
        )
        model = Branch(encoder, heads["victim"]).eval()

        def left(images: torch.Tensor, model: Branch = model) -> float:
            with torch.no_grad():
                return float((model(images).argmax(1) == test.labels).float().mean())

        print(f"| {name} | none | {left(test.images):.1%} | |")
        generator = torch.Generator().manual_seed(seed)
        signs = [eps * torch.randn(test.images[:1].shape, generator=generator).sign() for _ in range(5)]
        noise = min(left(UniversalPerturbation(delta=sign, eps=eps).apply(test.images)) for sign in signs)
        print(f"| {name} | random signs, worst of 5 | {noise:.1%} | |", flush=True)
        for title, attack in attacks.items():
            start = time.process_time()
            perturbation = attack.fit(encoder, loader, progress=False)
            seconds = time.process_time() - start
            where = perturbation.provenance.get("layers_used")
            shown = f"{title} ({', '.join(where[0])})" if where else title
            print(f"| {name} | {shown} | {left(perturbation.apply(test.images)):.1%} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""Do stronger attacks on the public encoders break a defense that the ladder's leave standing?

    python benchmarks/transfer.py --setting digits --seed 0 --models private --out runs/ladder-digits
    python benchmarks/transfer.py --setting cifar --seed 0 --models private --out runs/ladder-cifar --threads 1
    python benchmarks/transfer.py --setting cifar --models published --benign cifar-resnet56 --out runs/ladder-cifar

Every attacker has public encoders and nothing else: more steps, translation and scale invariance, another distance,
several random starts, every public encoder of the family at once, or labels and heads of his own. The first two rows
are those of `ladder.py`, whose defenses are found in the same folder, or trained there. The last row counts an image
only if it survives every attack of the table, in the hands of somebody who knows which one will do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

import torch
from common import header, row
from ladder import SETTINGS, UNDEFENDED, Bench, add_bench_options, hits
from torch import Tensor, nn

from zepad.attacks import APGD, FeaturePGD, cross_entropy, l2_distance, mean_logits
from zepad.evaluation import Attacker, against
from zepad.presets import PRESETS

_MIDI = {"momentum": 1.0, "diversity": 0.5}


def attackers(bench: Bench) -> list[Attacker]:
    """Return the attackers, on victim and auxiliary where their names say nothing else."""
    eps, both = bench.setting.eps, bench.public

    def on_features(name: str, *encoders: nn.Module, **settings: object) -> Attacker:
        attack = FeaturePGD(eps=eps, **{"steps": 30, **settings})
        target = against(*(encoders or both))
        return Attacker(name=name, threat_model="semi-black-box+", attack=attack, target=target, precision="auto")

    family = (*both, *bench.unseen.values(), *bench.third.values())
    own = [bench.undefended(name) for name in UNDEFENDED]
    heads = mean_logits(lambda images: torch.stack([branch(images) for branch in own]))
    found = [
        on_features("PGD-20", steps=20),
        on_features("MI-DI-30", **_MIDI),
        on_features("MI-DI-100", **_MIDI, steps=100),
        on_features("MI-DI-30, five starts", **_MIDI, restarts=5),
        on_features("MI-DI-30, L2 distance", **_MIDI, distance=l2_distance),
        on_features("MI-DI-TI-30, kernel 3", **_MIDI, translation=3),
        on_features("MI-DI-SI-30, three scales", **_MIDI, scales=3),
    ]
    if len(family) > len(both):
        found.append(on_features("MI-DI-50, the whole family", *family, **_MIDI, steps=50))
    labelled = APGD(eps=eps, steps=50, loss_fn=cross_entropy)
    target = against(heads)
    return [*found, Attacker(name="APGD-CE-50, labels", threat_model="semi-black-box+", attack=labelled, target=target)]


def scores(bench: Bench, model: nn.Module, attacked: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the accuracy of a model in per cent under no attack, under each, and under all together."""
    survived = {name: hits(model, images, bench.labels) for name, images in attacked.items()}
    kept = {
        "benign": hits(model, bench.test.images, bench.test.labels),
        **survived,
        "all together": torch.stack(list(survived.values())).amin(dim=0),
    }
    return {name: round(100 * float(right.mean()), 2) for name, right in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--models", nargs="*", choices=tuple(PRESETS), default=["private"])
    add_bench_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(argparse.Namespace(**vars(args), attackers="public", autoattack=0))
    name = " ".join(["transfer", *(f"with {encoder}" for encoder in bench.third)])
    attacked = bench.attacked(name, lambda: {"transfer": attackers(bench)})["transfer"]
    file = bench.folder / f"transfer-{args.split}.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for model in (UNDEFENDED[0], *args.models):
        defended = bench.undefended(model) if model in UNDEFENDED else bench.defense(model)[0]
        found[bench.title(model)] = scores(bench, defended, attacked)
        file.write_text(json.dumps(found, indent=1))
    print("\n".join(header("per cent", *found)))
    for attack in found[UNDEFENDED[0]]:
        print(row(attack, *(f"{kept[attack]:.1f}" for kept in found.values())), flush=True)


if __name__ == "__main__":
    main()

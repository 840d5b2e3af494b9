"""Harden once without labels, then defend other tasks by heads alone.

    python benchmarks/harden_once.py --out runs/ladder
    python benchmarks/harden_once.py --source tiny --tasks tiny --out runs/tiny
    python benchmarks/harden_once.py --out runs/ladder --table

The encoders are hardened on the images of one setting of `ladder.py`, by a preset whose hardening takes no labels. Each
other task fits new heads to them and to the frozen public encoder of the benign branch, and trains nothing else. A
second row lets `calibrate` choose the vote of the benign branch, on images that no head was fitted to. One row for each
encoder keeps the head that was fitted to the *public* encoder, as whoever deployed a classifier before has it. The
attackers have the public encoders and images of the task. Defenses, attacked images and fitted perturbations are those
of `ladder.py --out OUT/SETTING`, and are found again there.
"""

from __future__ import annotations

import argparse
import json

import torch
from ladder import SETTINGS, UNDEFENDED, Bench, add_bench_options, table
from torch.utils.data import DataLoader

from zepad import HeadConfig
from zepad.modules import Branch


def bench(args: argparse.Namespace, setting: str) -> Bench:
    """Return the data, encoders and attackers of one setting, in its own folder."""
    own = {"setting": setting, "out": args.out / setting, "attackers": "public", "autoattack": 0}
    return Bench(argparse.Namespace(**{**vars(args), **own}))


def rows(args: argparse.Namespace, task: str) -> dict[str, dict[str, float]]:
    """Return the scores of every model of one task."""
    source = bench(args, args.source)
    defense, _ = source.defense(args.preset)
    target = source if task == args.source else bench(args, task)
    attacked = target.attacked("public", target.public_attackers)
    undefended = {name: target.undefended(name) for name in UNDEFENDED}
    found = {name: target.score(model, attacked) for name, model in undefended.items()}
    if task != args.source:
        defense.fit_heads(target.loader(target.train), HeadConfig(seed=args.seed), progress=False)
        found[f"{args.preset}, new heads"] = target.score(defense, attacked)
        defense.calibrate(DataLoader(target.others, batch_size=250))
        print(f"{task}: {defense.fusion}", flush=True)
    found[f"{args.preset}, {'as hardened' if task == args.source else 'new heads, calibrated'}"] = target.score(
        defense, attacked
    )
    for role in ("victim", "auxiliary", "benign"):
        found[f"{args.preset}, {role} branch alone"] = target.score(defense.branch(role), attacked)
    for role, (name, public) in zip(("victim", "auxiliary"), undefended.items(), strict=True):
        kept = Branch(defense.encoder(role), public.head).eval()
        found[f"{args.preset}, {role} branch, head of the {name}"] = target.score(kept, attacked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", choices=SETTINGS, default="cifar", help="the data that the encoders are hardened on"
    )
    parser.add_argument("--tasks", nargs="*", choices=SETTINGS, default=["cifar", "transfer", "imagenette"])
    parser.add_argument("--preset", choices=("private", "published", "cautious"), default="private")
    add_bench_options(parser)
    parser.add_argument("--table", action="store_true", help="only print the tables of all seeds that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.out / f"once-{args.source}-{args.preset}"
    for task in args.tasks:
        file = folder / f"seed-{args.seed}" / f"{task} {args.split}.json"
        if not args.table and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = rows(args, task)
            file.write_text(json.dumps(found, indent=1))
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"seed-*/{task} {args.split}.json"))]
        if runs:
            print(f"{task}\n\n{table(runs)}\n", flush=True)


if __name__ == "__main__":
    main()

"""How long the whole ladder of one model takes, the training of the attacker's copies included.

    python benchmarks/evaluation_time.py --setting digits --out runs/ladder-digits

The model is that of `ladder.py --out OUT`, found there or trained. Everything else begins with nothing, in one
process of one thread, with the attackers of `zepad evaluate` and their default settings. The attacker repeats the
training of the defense on other images and fits heads for the task to his copies. Then `zepad.protocols.measure` runs
whoever knows the public encoders, the copies, the published encoders or the model itself. What is printed is the time
of the processor, which other programs lengthen less than that of a clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import torch
from common import header, row, universal
from ladder import SETTINGS, Bench, add_bench_options
from torch.utils.data import DataLoader

from zepad import HeadConfig
from zepad.data import LabelledImages
from zepad.presets import PRESETS
from zepad.protocols import Protocol, measure, replica_branches, replica_of
from zepad.types import ROLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--model", choices=tuple(PRESETS), default="private")
    parser.add_argument("--steps", type=int, default=Protocol.steps, help="number of steps of the per-image attacks")
    parser.add_argument("--queries", type=int, default=Protocol.queries, help="number of queries of Square")
    add_bench_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(argparse.Namespace(**vars(args), attackers="public", autoattack=0))
    defense, _ = bench.defense(args.model)
    public = dict(zip(ROLES, (*bench.public, *bench.third.values()), strict=False))
    protocol = Protocol(
        eps=bench.setting.eps,
        steps=args.steps,
        queries=args.queries,
        universal=universal(args.universal, eps=bench.setting.eps, seed=args.seed),
        seed=args.seed,
        progress=False,
    )
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        others = bench.loader(bench.others)
        encoders = replica_of(defense, public, others, folder=folder, progress=False)
        config = HeadConfig(seed=args.seed + 1)
        copies = replica_branches(encoders, others, config, num_classes=10, progress=False)
        trained = time.process_time()
        (report,) = measure(
            {bench.title(args.model): defense},
            DataLoader(LabelledImages(bench.images, bench.labels, bench.test.classes), batch_size=100),
            public=public,
            surrogate=DataLoader(bench.surrogate, batch_size=128),
            num_classes=10,
            protocol=protocol,
            others=bench.unseen,
            copies=copies,
            folder=folder,
        ).values()
    ended = time.process_time()
    minutes = {"copies": trained - began, "attacks": ended - trained, "together": ended - began}
    print(f"{report.model}, {report.images} images, {len(report.attacks)} attackers\n")
    print("\n".join(header("per cent", "benign", *report.worst)))
    kept = (report.benign_accuracy, *(rates.robust_accuracy for rates in report.worst.values()))
    print(row(report.model, *(f"{100 * rate.value:.1f}" for rate in kept)))
    print(json.dumps({"minutes": {phase: round(seconds / 60, 1) for phase, seconds in minutes.items()}}), flush=True)


if __name__ == "__main__":
    main()

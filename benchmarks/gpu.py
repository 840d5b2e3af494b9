"""Every experiment that wants a GPU, in one command that goes on where it was cut.

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --out runs/gpu-tiny --small --device cpu

Two ResNet-18s are pre-trained without labels on CIFAR-10 in bfloat16, by Barlow Twins and SimCLR. Every preset and
every baseline of `ladder.py` is trained on them, and attacked by the whole ladder and by AutoAttack. Each step is one
command of its own, which is printed, and whose log, JSON and weights lie in the folder; `results.md` has the table. A
step that is finished is not repeated. AutoAttack is left out, with a line that says so, where its package is missing.
`--small` proves on a CPU, in minutes, that every step runs: digits, few images, one epoch.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ladder import BASELINES, UNDEFENDED
from pretrain_cifar import LOSSES

from zepad.presets import PRESETS

HERE = Path(__file__).parent
MODELS = (*UNDEFENDED, *PRESETS, *BASELINES)
AUTOATTACKED = 200  # images: AutoAttack makes some thousands of passes of each


def step(name: str, script: str, *options: object, folder: Path) -> None:
    """Run one script, append what it prints to its log, and end the run if it fails."""
    command = [sys.executable, str(HERE / script), *map(str, options)]
    log, start = folder / f"{name}.log", time.perf_counter()
    print(f"{name}: {shlex.join(command)}", flush=True)
    with log.open("a") as written:
        ended = subprocess.run(command, stdout=written, stderr=subprocess.STDOUT, check=False)  # noqa: S603 - a script of this folder
    if ended.returncode:
        raise SystemExit(f"{name} failed. The end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:]))
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of pre-training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, help="local mirror of CIFAR-10; without it, it is downloaded")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--small", action="store_true", help="prove on the digits that every step runs")
    args = parser.parse_args()
    encoders, ladder = args.out / "encoders", args.out / "ladder"
    args.out.mkdir(parents=True, exist_ok=True)
    common = ["--device", args.device, *(["--shared", args.shared] if args.shared else [])]
    pretraining = ["--encoder", "resnet18", "--out", encoders, *common]
    measured = ["--seed", args.seed, "--out", ladder, *common]
    if args.small:
        pretraining += ["--data", "digits", "--images", 64, "--epochs", 1]
        measured += ["--setting", "tiny", "--epochs", 1, "--universal", "UAP"]
    else:
        pretraining += ["--epochs", args.epochs]
        measured += ["--setting", "resnet18", "--encoders", encoders]
    if importlib.util.find_spec("autoattack") is None:
        print("AutoAttack is left out: pip install git+https://github.com/fra31/auto-attack", flush=True)
    else:
        measured += ["--autoattack", 4 if args.small else AUTOATTACKED]
    for method in LOSSES:
        if not (encoders / f"resnet18-{method}.json").exists():
            step(f"pre-training by {method}", "pretrain_cifar.py", "--methods", method, *pretraining, folder=args.out)
    for model in args.models:
        step(f"ladder of {model}", "ladder.py", "--models", model, *measured, folder=args.out)
    step("table", "ladder.py", "--table", *measured, folder=args.out)
    table = (args.out / "table.log").read_text().rpartition("| per cent")
    (args.out / "results.md").write_text(table[1] + table[2])
    print(f"The table is in {args.out / 'results.md'}, each number in {ladder}.", flush=True)


if __name__ == "__main__":
    main()

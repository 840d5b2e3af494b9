"""The table of defenses: train each with one budget, then attack all with the same attackers.

    python benchmarks/baselines.py train    --setting digits --seed 0 --out runs/digits
    python benchmarks/baselines.py evaluate --setting digits --seed 0 --out runs/digits
    python benchmarks/baselines.py table    --setting digits --out runs/digits

Branches are saved as they are trained and reports as they are made: run it again and it goes on where it stopped.
Training images are the first of the training set, test images the first of the test set. All recipes are
`HardenConfig`'s defaults but for budget, length and FARE's rate; nothing is chosen by test data.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import MIRROR_HELP, add_universal, cell, header, load_encoders, load_images, row, universal
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import UniversalPerturbation
from zepad.encoders import probe
from zepad.ensemble import BranchEnsemble
from zepad.evaluation import (
    Attacker,
    EvalReport,
    UniversalAttack,
    evaluate,
    save_report,
    semi_black_box,
    semi_black_box_plus,
    white_box,
)
from zepad.modules import Branch, MLPHead
from zepad.objectives import fare, gen_af, mart, pgd_at, trades
from zepad.training import fit_heads, harden_branch, training_device


@dataclass(frozen=True)
class Setting:
    """The data, encoders and budgets that the numbers of one table have in common."""

    data: str
    encoders: str
    train_images: int | None
    test_images: int | None
    attacker_images: int
    epochs: int
    hardening_eps: float
    eps: float
    steps: int
    queries: int


SETTINGS = {
    "digits": Setting("digits", "digits", None, None, 1300, 10, 25 / 255, 32 / 255, 30, 300),
    "cifar": Setting("cifar10", "cifar", 3000, 300, 500, 10, 8 / 255, 10 / 255, 30, 300),
    # For a GPU: all of CIFAR-10, with the self-supervised ResNet-18s of pretrain_cifar.py.
    "resnet18": Setting("cifar10", "resnet18", None, None, 5000, 20, 8 / 255, 10 / 255, 100, 5000),
    "tiny": Setting("digits", "digits", 64, 20, 16, 1, 25 / 255, 32 / 255, 2, 5),  # proves that the script runs
}
BASELINES: dict[str, Callable[[], object]] = {
    "PGD-AT": pgd_at,
    "TRADES": trades,
    "MART": mart,
    "Gen-AF": gen_af,
    "FARE": fare,
}
# FARE's loss has another scale: of five rates this one kept most on images held out of the digits' training set.
RATES = {"FARE": 5e-3}
LONGER = "PGD-AT, 3 x as long"
CLASSES = 10
BATCH = 128


@dataclass(frozen=True)
class Kept:
    """A universal attack that is fitted once and read from its file after that."""

    attack: UniversalAttack
    file: Path
    seed: int

    def fit(self, encoder: object, images: DataLoader, *, progress: bool = True) -> UniversalPerturbation:
        """Read the perturbation, or fit it first."""
        if not self.file.exists():
            torch.manual_seed(self.seed)  # of the loader's order
            start = time.perf_counter()
            self.attack.fit(encoder, images, progress=progress).save(self.file)
            print(f"{self.file.stem}: {time.perf_counter() - start:.0f} s", flush=True)
        return UniversalPerturbation.load(self.file)


class Bench:
    """One setting and seed: data, encoders, and the folder of what is finished."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting, self.seed, self.universal = SETTINGS[args.setting], args.seed, args.universal
        given = {"train_images": args.train_images, "test_images": args.test_images, "epochs": args.epochs}
        self.setting = replace(self.setting, **{name: value for name, value in given.items() if value is not None})
        self.folder = args.out / f"seed-{args.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train = load_images(self.setting.data, "train", shared=args.shared, limit=self.setting.train_images)
        self.test = load_images(self.setting.data, "test", shared=args.shared, limit=self.setting.test_images)
        victim, auxiliary = load_encoders(self.setting.encoders, args.shared, args.encoders)
        self.device = training_device()
        self.public = {"victim": victim.to(self.device), "auxiliary": auxiliary.to(self.device)}
        torch.manual_seed(self.seed)
        self.loader = DataLoader(self.train, batch_size=BATCH, shuffle=True)
        self.test_loader = DataLoader(self.test, batch_size=250)
        self.config = HardenConfig(eps=self.setting.hardening_eps, epochs=self.setting.epochs, seed=self.seed)

    def train_all(self, chosen: list[str]) -> None:
        """Train what is chosen and not there yet."""
        jobs: dict[str, Callable[[], dict[str, Branch]]] = {"undefended": self._undefended, "ZePAD": self._zepad}
        for name, method in BASELINES.items():
            config = replace(self.config, lr=RATES.get(name, self.config.lr))
            jobs[name] = lambda name=name, method=method, config=config: {name: self._hardened(method(), config)}
        longer = replace(self.config, epochs=3 * self.setting.epochs)
        jobs[LONGER] = lambda: {LONGER: self._hardened(pgd_at(), longer)}
        for name in chosen or list(jobs):
            record = self.folder / f"{name}.json"
            if record.exists():
                continue
            start = time.perf_counter()
            branches = jobs[name]()
            for part, branch in branches.items():
                save_file(
                    {k: v.detach().cpu().clone().contiguous() for k, v in branch.state_dict().items()}, self._file(part)
                )
            record.write_text(json.dumps({"branches": list(branches), "seconds": time.perf_counter() - start}))
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    def _hardened(self, method: object, config: HardenConfig) -> Branch:
        return harden_branch(self.public["victim"], self.loader, config, objective=method, progress=False)[0]

    def _undefended(self) -> dict[str, Branch]:
        heads = fit_heads(
            self.public,
            self.loader,
            HeadConfig(seed=self.seed),
            channels=3,
            num_classes=CLASSES,
            progress=False,
        )
        return {f"clean {role}": Branch(self.public[role], head) for role, head in heads.items()}

    def _zepad(self) -> dict[str, Branch]:
        defense = ZePAD.from_encoders(
            self.public["victim"], self.public["auxiliary"], num_classes=CLASSES, preset="paper"
        )
        defense.harden(self.loader, self.config, progress=False)
        defense.fit_benign(
            self.loader,
            BenignConfig(seed=self.seed, freeze_encoder=False),
            head_config=HeadConfig(seed=self.seed),
            progress=False,
        )
        return {f"ZePAD {role}": defense.branch(role) for role in ("victim", "auxiliary", "benign")}

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def branch(self, part: str) -> Branch:
        """Load one trained branch."""
        role = "auxiliary" if part.endswith(("auxiliary", "benign")) else "victim"  # the benign one began as a copy
        encoder = copy.deepcopy(self.public[role])
        branch = Branch(encoder, MLPHead(probe(encoder)[1], CLASSES))
        branch.load_state_dict(load_file(self._file(part)))
        return branch.eval().requires_grad_(False).to(self.device)

    def models(self) -> dict[str, nn.Module]:
        """Return every model of the table whose parts are trained."""
        compositions: dict[str, dict[str, str]] = {
            "undefended": {"": "clean victim"},
            "three undefended encoders": {
                "victim": "clean victim",
                "auxiliary": "clean auxiliary",
                "benign": "ZePAD benign",
            },
            **{name: {"": name} for name in (*BASELINES, LONGER)},
            "ZePAD": {role: f"ZePAD {role}" for role in ("victim", "auxiliary", "benign")},
        }
        models: dict[str, nn.Module] = {}
        for name, parts in compositions.items():
            if all(self._file(part).exists() for part in parts.values()):
                branches = {role: self.branch(part) for role, part in parts.items()}
                models[name] = branches[""] if "" in branches else BranchEnsemble(branches, threshold=0.1)
        return models

    def attackers(self) -> list[Attacker]:
        """Return the attackers who know public encoders alone, the same for every model."""
        common = {"eps": self.setting.eps, "seed": self.seed, "progress": False}
        attacks = universal(self.universal, eps=self.setting.eps, seed=self.seed)
        kept = {name: Kept(attack, self.folder / f"{name}.perturbation", self.seed) for name, attack in attacks.items()}
        victim, auxiliary = self.public["victim"], self.public["auxiliary"]
        surrogate = Subset(self.train, range(min(len(self.train), self.setting.attacker_images)))
        loader = DataLoader(surrogate, batch_size=BATCH, shuffle=True)
        return [
            *semi_black_box(victim, loader, universal=kept, **common),
            *semi_black_box_plus(victim, auxiliary, loader, universal={}, **common),  # the feature attack alone
        ]

    def evaluate_all(self, chosen: list[str], data: str) -> None:
        """Evaluate what is trained and not reported yet."""
        models = {name: model for name, model in self.models().items() if not chosen or name in chosen}
        todo = {name: model for name, model in models.items() if not self._report(name).exists()}
        if not todo:
            return
        common = self.attackers()
        for name, model in todo.items():
            own = white_box(
                model,
                eps=self.setting.eps,
                num_classes=CLASSES,
                steps=self.setting.steps,
                queries=self.setting.queries,
            )
            report = evaluate(
                model,
                self.test_loader,
                [*common, *own],
                name=name,
                data=data,
                folder=self.folder / f"{name} state",
                resume=True,
                sanity=self.seed == 0,
                seed=self.seed,
                progress=False,
            )
            save_report(report, self.folder / f"{name} report")
            print(f"{name}: {report.provenance['seconds']} s", flush=True)

    def _report(self, name: str) -> Path:
        return self.folder / f"{name} report" / "report.json"


def table(out: Path) -> str:
    """Return the Markdown table over all seeds found: mean, and standard deviation where there are several."""
    reports: dict[str, list[EvalReport]] = {}
    for file in sorted(out.glob("seed-*/* report/report.json")):
        report = EvalReport.load(file)
        reports.setdefault(report.model, []).append(report)
    order = ["undefended", "three undefended encoders", *BASELINES, LONGER, "ZePAD"]
    columns: list[tuple[str, Callable[[EvalReport], float]]] = [("benign", lambda r: r.benign_accuracy.value)]
    shared = [a.name for a in next(iter(reports.values()))[0].attacks if a.threat_model == "semi-black-box"]
    columns += [(name, lambda r, name=name: _robust(r, name)) for name in shared]
    columns += [
        (f"worst {group}", lambda r, group=group: r.worst[group].robust_accuracy.value)
        for group in ("semi-black-box", "semi-black-box+", "white-box")
    ]
    lines = [*header("per cent", *(title for title, _ in columns))]
    lines += [
        row(name, *(cell([value(report) for report in reports[name]]) for _, value in columns))
        for name in order
        if name in reports
    ]
    return "\n".join(lines)


def _robust(report: EvalReport, attacker: str) -> float:
    return next(a.rates.robust_accuracy.value for a in report.attacks if a.name == attacker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "evaluate", "table"))
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    add_universal(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--encoders", type=Path, help="folder where pretrain_cifar.py left the ResNet-18s")
    parser.add_argument("--train-images", type=int, help="number of training images, in place of the setting's")
    parser.add_argument("--test-images", type=int, help="number of test images, in place of the setting's")
    parser.add_argument("--epochs", type=int, help="number of epochs of hardening, in place of the setting's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=[], help="models to train or evaluate; all by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.action == "table":
        print(table(args.out))
    elif args.action == "train":
        Bench(args).train_all(args.models)
    else:
        Bench(args).evaluate_all(args.models, args.setting)


if __name__ == "__main__":
    main()

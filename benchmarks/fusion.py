"""Fusion rules and detectors, against attackers who know them.

    python benchmarks/fusion.py train  --setting digits --seed 0 --out runs/fusion-digits
    python benchmarks/fusion.py craft  --setting digits --seed 0 --out runs/fusion-digits
    python benchmarks/fusion.py attack --setting digits --seed 0 --out runs/fusion-digits
    python benchmarks/fusion.py detect --setting digits --seed 0 --out runs/fusion-digits
    python benchmarks/fusion.py autoattack --setting digits --seed 0 --out runs/fusion-digits --attacked 100
    python benchmarks/fusion.py table  --setting digits --out runs/fusion-digits

`train` hardens with the library, keeps the heads trained along, and trains the benign branch. `craft` makes what no
fusion has a say in: attacks on the public victim, and white-box attacks on parts of the ensemble. `attack` takes each
fusion in turn: what was crafted, and then attacks through this very fusion on the images that are left. `detect`
measures every detector. `autoattack` runs AutoAttack, the standard version of its authors (`pip install
git+https://github.com/fra31/auto-attack`), on the recommended fusion and on each hardened branch alone. Each fusion's
parameters are chosen on validation images; settings named by a number make the trade-off curve. Validation images:
digits, a fifth of the training images, held out of all training of the defense (the public encoders saw them without
labels); CIFAR-10, whose public encoders saw every training image with its label, the second half of the test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MIRROR_HELP, add_universal, autoattack, cell, header, load_encoders, part, row, split, universal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD, detectors, fusion
from zepad.attacks import (
    APGD,
    Attack,
    DetectorEvading,
    JointAPGD,
    Square,
    TargetedAPGD,
    dlr,
    fused_by,
    hardened_branches,
    margin,
    mean_logits,
    one_branch,
)
from zepad.data import LabelledImages
from zepad.evaluation import auroc, semi_black_box
from zepad.fusion import RFDM, Bounded, FusionRule
from zepad.objectives import Recipe, trades
from zepad.training import fit_heads, training_device
from zepad.types import HARDENED_ROLES


@dataclass(frozen=True)
class Setting:
    """The data, encoders and budgets that the numbers of one table have in common."""

    train: str
    encoders: str
    images: int | None
    epochs: int | None
    inner_steps: int
    objective: Callable[[], Recipe] | None
    flip: bool
    eps: float
    attacked: int
    freeze_benign: bool
    attacker_images: int


SETTINGS = {
    "digits": Setting("digits", "digits", None, 100, 5, None, False, 25 / 255, 497, False, 1300),
    "cifar": Setting("cifar10", "cifar", 10000, 6, 2, trades, True, 8 / 255, 300, True, 500),
    # For a GPU: all of CIFAR-10, with the self-supervised ResNet-18s of pretrain_cifar.py.
    "resnet18": Setting("cifar10", "resnet18", None, 30, 5, trades, True, 8 / 255, 1000, False, 5000),
    "tiny": Setting("digits", "digits", 240, 1, 1, None, False, 25 / 255, 12, False, 32),  # proves that it runs
}
VOTES = (0.0, 0.5, 1.0, 2.0, 4.0)
STEPS, QUERIES = 30, 300
FPR = 0.05


class Bench:
    """One setting and seed: data, the defense, and the folder of what is finished."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting, self.seed, self.folder = SETTINGS[args.setting], args.seed, args.out / f"seed-{args.seed}"
        setting = self.setting
        self.eps = setting.eps if args.eps is None else args.eps / 255
        self.universal = args.universal
        self.measured = self.folder if args.eps is None else self.folder / f"eps {args.eps:g}"
        self.measured.mkdir(parents=True, exist_ok=True)
        self.train, self.val, self.test = split(setting.train, args.shared, args.images or setting.images, self.seed)
        if args.scored:
            self.val, self.test = (part(data, torch.arange(args.scored)) for data in (self.val, self.test))
        self.epochs, self.benign_epochs = args.epochs or setting.epochs, args.epochs
        first = torch.arange(min(args.attacked or setting.attacked, len(self.test)))
        self.attacked = part(self.test, first)
        torch.manual_seed(self.seed)
        self.loader = DataLoader(Flipped(self.train) if setting.flip else self.train, batch_size=128, shuffle=True)
        self.val_loader = DataLoader(self.val, batch_size=500)
        self.public = load_encoders(setting.encoders, args.shared, args.encoders)

    def train_all(self) -> None:
        """Harden, train the benign branch, fit every head."""
        start = time.perf_counter()
        config = HardenConfig(
            eps=self.setting.eps, epochs=self.epochs, steps=self.setting.inner_steps, seed=self.seed
        )  # fmt: skip
        defense = ZePAD.from_encoders(*self.public, num_classes=10, preset="paper", detector="combined")
        method = self.setting.objective and self.setting.objective()
        defense.harden(self.loader, config, objective=method, progress=False)
        benign = BenignConfig(seed=self.seed, epochs=self.benign_epochs, freeze_encoder=self.setting.freeze_benign)
        defense.fit_benign(self.loader, benign, head_config=None, progress=False)
        defense.save_pretrained(self.folder / "trained heads")
        roles = ("victim", "auxiliary")
        heads = fit_heads(
            {role: defense.encoder(role) for role in roles},
            self.loader,
            HeadConfig(seed=self.seed),
            channels=3,
            num_classes=10,
            progress=False,
        )
        for role, head in heads.items():
            defense.branch(role).head = head
        defense.save_pretrained(self.folder / "refitted heads")
        print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)

    def defense(self, heads: str) -> ZePAD:
        """Load what was trained, by the kind of head of its hardened branches."""
        custom = {} if self.setting.encoders == "digits" else dict(zip(HARDENED_ROLES, self.public, strict=True))
        return ZePAD.from_pretrained(self.folder / f"{heads} heads", **custom).to(training_device())

    def craft(self, heads: str) -> None:
        """Make the attacks on the public victim, and those on parts of the ensemble."""
        images, labels = self.attacked.images, self.attacked.labels
        file = self.measured / "public.pt"
        if not file.exists():
            start = time.perf_counter()
            victim = self.defense(heads).encoder("reference")
            surrogate = Subset(self.train, range(min(len(self.train), self.setting.attacker_images)))
            attackers = semi_black_box(
                victim,
                DataLoader(surrogate, batch_size=128, shuffle=True),
                eps=self.eps,
                universal=universal(self.universal, eps=self.eps, seed=self.seed),
                seed=self.seed,
                progress=False,
            )
            found = {a.name: in_chunks(a.attack, a.target(None), images, labels, self.seed) for a in attackers}
            torch.save(found, file)
            print(f"public attacks: {time.perf_counter() - start:.0f} s", flush=True)
        defense, start = self.defense(heads), time.perf_counter()
        found = {}
        logits, eps = fast(defense.branch_logits), self.eps
        plans: dict[str, tuple[Attack, nn.Module | Callable[[Tensor], Tensor]]] = {
            "APGD-CE on mean logits": (APGD(eps=eps, steps=STEPS), mean_logits(logits)),
            "APGD-DLR on mean logits": (APGD(eps=eps, steps=STEPS, loss_fn=dlr), mean_logits(logits)),
            "APGD-CE on the hardened branches": (APGD(eps=eps, steps=STEPS), hardened_branches(logits)),
            "APGD-DLR on the hardened branches": (APGD(eps=eps, steps=STEPS, loss_fn=dlr), hardened_branches(logits)),
            "APGD-CE on RFDM": (APGD(eps=eps, steps=STEPS), fused_by(logits, RFDM())),
            "APGD-CE on the victim branch": (APGD(eps=eps, steps=STEPS), fast(defense.branch("victim"))),
            "APGD-CE on the auxiliary branch": (APGD(eps=eps, steps=STEPS), fast(defense.branch("auxiliary"))),
            "APGD-CE on the benign branch": (APGD(eps=eps, steps=STEPS), fast(defense.branch("benign"))),
            "joint APGD, every branch": (
                JointAPGD(eps=eps, branch_logits=logits, fuse=lambda z: z.mean(0), steps=STEPS), one_branch(logits, 0),
            ),
        }  # fmt: skip
        for name, (attack, target) in plans.items():
            found[name] = in_chunks(attack, target, images, labels, self.seed)
        torch.save(found, self.measured / f"{heads} parts.pt")
        print(f"attacks on parts of the ensemble: {time.perf_counter() - start:.0f} s", flush=True)

    def attack(self, heads: str, only: list[str]) -> None:
        """Measure every fusion, and each branch alone, at the worst case over all attacks, own and crafted."""
        defense = self.defense(heads)
        public, parts = torch.load(self.measured / "public.pt"), torch.load(self.measured / f"{heads} parts.pt")
        file = self.measured / f"{heads} results.json"
        results = recorded(file)
        undefended = defense.branch("reference").eval()
        fusions: dict[str, Callable[[], tuple[nn.Module, ZePAD | None, dict[str, Any]]]] = {
            "undefended": lambda: (undefended, None, {})
        }
        for role in ("victim", "auxiliary", "benign"):
            fusions[f"{role} branch alone"] = lambda role=role: (defense.branch(role).eval(), None, {})
        for rule in (fusion.resolve(name, argument="rule") for name in fusion.names()):  # those of others included
            if rule.has_choice():
                fusions[f"{rule.name}, chosen"] = lambda rule=rule: self.chosen(defense, rule.name)
            else:
                fusions[rule.name] = lambda rule=rule: self.fused(defense, rule)
        for vote in VOTES:
            fusions[f"bounded, vote {vote:g}"] = lambda vote=vote: self.fused(defense, Bounded(vote=vote))
        for name, make in fusions.items():
            if name in results or (only and name not in only):
                continue
            start = time.perf_counter()
            model, ensemble, settings = make()
            same = [found for found in results.values() if ensemble and found["fusion"] == defense.fusion.summary()]
            measured = same[0] if same else self.measure(model, ensemble, public, parts)
            results[name] = {**measured, "settings": settings, "fusion": defense.fusion.summary() if ensemble else None}
            file.write_text(json.dumps(results, indent=1))
            short = {k: round(100 * v, 1) for k, v in results[name].items() if isinstance(v, float)}
            print(f"{name}: {short} {settings} {time.perf_counter() - start:.0f} s", flush=True)

    def fused(self, defense: ZePAD, rule: FusionRule) -> tuple[nn.Module, ZePAD, dict[str, Any]]:
        """Return the defense under a fusion rule."""
        defense.configure(fusion=rule)
        return defense, defense, rule.settings()

    def chosen(self, defense: ZePAD, rule: Any) -> tuple[nn.Module, ZePAD, dict[str, Any]]:
        """Return the defense under a rule with the parameters that calibration chooses."""
        defense.configure(fusion=rule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a floor that cannot be reached: it is in the record
            defense.calibrate(self.val_loader)
        found = defense.provenance["calibration"]["fusion"]
        more = {name: found[name] for name in ("benign_floor", "benign_accuracy")}
        return defense, defense, {**defense.fusion.settings(), **more}

    def measure(
        self, model: nn.Module, ensemble: ZePAD | None, public: dict[str, Tensor], parts: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Return the accuracy without an attack, under the public attacks and under the worst of all white boxes."""
        images, labels, eps = self.attacked.images, self.attacked.labels, self.eps
        semi = {name: right(model, batch, labels) for name, batch in public.items()}
        survives = right(model, images, labels)
        fell: dict[str, int] = {}

        def strike(name: str, attacked: Callable[[Tensor], Tensor]) -> None:
            left = survives.nonzero().flatten()
            if len(left):
                kept = right(model, attacked(left), labels[left])
                survives[left] &= kept
                fell[name] = int((~kept).sum())

        for name, batch in {**parts, **public}.items():
            strike(name, lambda left, batch=batch: batch[left])
        quick = fast(model)
        own: dict[str, tuple[Attack, Any]] = {
            "APGD-CE": (APGD(eps=eps, steps=STEPS), quick),
            "APGD-DLR": (APGD(eps=eps, steps=STEPS, loss_fn=dlr), quick),
            "APGD-T": (TargetedAPGD(eps=eps, steps=STEPS, classes=2), quick),
        }
        if ensemble is not None:
            joint = JointAPGD(
                eps=eps, branch_logits=fast(ensemble.branch_logits), fuse=ensemble.fuse, steps=STEPS, classes=2
            )
            own["joint APGD"] = (joint, ensemble)
        own["APGD-CE, margin, 2 restarts, float32"] = (
            APGD(eps=eps, steps=2 * STEPS, restarts=2 if len(labels) <= 300 else 1, loss_fn=margin), model,
        )  # fmt: skip
        own["Square"] = (Square(eps=eps, queries=QUERIES), model)
        for name, (attack, target) in own.items():
            strike(name, lambda left, a=attack, t=target: in_chunks(a, t, images[left], labels[left], self.seed))
        return {
            "benign": rate(right(model, self.test.images, self.test.labels)),
            "benign on the attacked": rate(right(model, images, labels)),
            "semi-black-box": rate(torch.stack(list(semi.values())).all(0)),
            "white-box": rate(survives),
            "by public attack": {name: rate(hits) for name, hits in semi.items()},
            "fell to": fell,
        }

    def autoattack(self, heads: str, rule: str) -> None:
        """Run AutoAttack on the recommended fusion, and on each hardened branch alone."""
        defense, device = self.defense(heads), training_device()
        self.chosen(defense, rule)
        images, labels = self.attacked.images, self.attacked.labels
        file = self.measured / f"{heads} autoattack.json"
        results = recorded(file)
        models = {f"{rule}, chosen": defense, **{f"{r} branch alone": defense.branch(r) for r in HARDENED_ROLES}}
        for name, model in models.items():
            start = time.perf_counter()
            model.eval()
            attacked = autoattack(model, images.to(device), labels.to(device), eps=self.eps, seed=self.seed).cpu()
            benign = right(model, images, labels)
            results[name] = {
                "images": len(labels),
                "benign on the attacked": rate(benign),
                "AutoAttack": rate(benign & right(model, attacked, labels)),
            }
            file.write_text(json.dumps(results, indent=1))
            print(f"AutoAttack, {name}: {results[name]} {time.perf_counter() - start:.0f} s", flush=True)

    def detect(self, heads: str, rule: str, only: list[str]) -> None:
        """Measure every detector: AUROC by attack, false positives, and an attacker who evades it."""
        defense = self.defense(heads)
        public = torch.load(self.measured / "public.pt")
        images, labels, eps = self.attacked.images, self.attacked.labels, self.eps
        undefended = defense.branch("reference").eval()
        fooled = {name: ~right(undefended, batch, labels) for name, batch in public.items()}
        file = self.measured / f"{heads} detectors.json"
        results = recorded(file)
        for name in only or detectors.names():
            start = time.perf_counter()
            defense.configure(fusion=rule, detector=name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                defense.calibrate(self.val_loader, fpr=FPR, fit_loader=self.loader)
            assert defense.threshold is not None
            benign = defense.detection_score(self.test.images)
            aurocs, hits, on_fooled = {}, {}, {}
            for attack, batch in public.items():
                scores = defense.detection_score(batch)
                aurocs[attack] = auroc(benign=benign, attacked=scores)
                hits[attack] = rate(scores > defense.threshold)
                on_fooled[attack] = (
                    auroc(benign=benign, attacked=scores[fooled[attack]]) if fooled[attack].any() else None
                )
            cautious = Cautious(defense)
            semi = torch.stack([right(cautious, batch, labels) for batch in public.values()]).all(0)
            plain = in_chunks(APGD(eps=eps, steps=STEPS), fast(defense), images, labels, self.seed)
            white = defense.detection_score(plain)
            evading = DetectorEvading(eps=eps, steps=STEPS, score=fast(defense.score), threshold=defense.threshold)
            evaded = in_chunks(evading, fast(defense), images, labels, self.seed)
            won = ~right(defense, evaded, labels) & (defense.detection_score(evaded) <= defense.threshold)
            lost = ~right(defense, plain, labels)
            results[name] = {
                "AUROC": aurocs,
                "AUROC, mean": statistics.mean(aurocs.values()),
                "AUROC where the undefended is fooled": on_fooled,
                "flagged": hits,
                "FPR": rate(benign > defense.threshold),
                "benign, flagged images left to the hardened branches": rate(
                    right(cautious, self.test.images, self.test.labels)
                ),
                "semi-black-box, flagged images left to the hardened branches": rate(semi),
                "AUROC under APGD-CE on the ensemble": auroc(benign=benign, attacked=white),
                "wrong under APGD-CE": rate(lost),
                "wrong and unflagged under APGD-CE": rate(lost & (white <= defense.threshold)),
                "wrong and unflagged under the evader": rate(won),
            }
            file.write_text(json.dumps(results, indent=1))
            short = {k: round(v, 3) for k, v in results[name].items() if isinstance(v, float)}
            print(f"{name}: {short} {time.perf_counter() - start:.0f} s", flush=True)


class Flipped(Dataset):
    """Images with a random horizontal flip."""

    def __init__(self, data: LabelledImages) -> None:
        self.data, self.classes = data, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), label


class Cautious(nn.Module):
    """A defense that leaves what its detector flags to the hardened branches."""

    def __init__(self, defense: ZePAD) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, images: Tensor) -> Tensor:
        """Return scores `(B, K)`, of which only the order matters."""
        flagged = self.defense.detect(images)
        hardened = hardened_branches(self.defense.branch_logits)(images)
        return torch.where(flagged[:, None], hardened, self.defense(images))


class fast(nn.Module):  # noqa: N801 - reads as the function it is
    """A model in bfloat16 for gradients: good enough to craft on, never to score with."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = model

    def forward(self, images: Tensor) -> Tensor:
        """Call the model under autocast."""
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.call(images).float()


def in_chunks(attack: Attack, target: Any, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Attack 250 images at a time, on the device that training uses."""
    device = training_device()
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.arange(len(labels)).split(250)
    return torch.cat(
        [attack(target, images[r].to(device), labels[r].to(device), generator=generator).cpu() for r in rows]
    )


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Say of each image whether its label is right."""
    device = training_device()
    with torch.no_grad():
        return torch.cat([model(chunk.to(device)).argmax(1).cpu() for chunk in images.split(500)]) == labels


def rate(hits: Tensor) -> float:
    """Return the share of true entries."""
    return float(hits.double().mean())


def table(out: Path, heads: str, eps: float | None) -> str:
    """Return the Markdown tables over all seeds found, mean and standard deviation."""
    results, detectors, autoattack = (
        merged(out, "." if eps is None else f"eps {eps:g}", f"{heads} {what}.json")
        for what in ("results", "detectors", "autoattack")
    )
    columns = ("benign", "benign on the attacked", "semi-black-box", "white-box")
    lines = [*header("fusion", "parameters", "seeds", *columns)]
    for name, found in results.items():
        shown = "; ".join(dict.fromkeys(parameters(run["settings"]) for run in found))
        lines.append(row(name, shown, str(len(found)), *(cell([run[c] for run in found], 100) for c in columns)))
    if detectors:
        first = next(iter(detectors.values()))[0]
        rest = [key for key, value in first.items() if isinstance(value, float)]
        lines += ["", *header("detector", "seeds", *first["AUROC"], *rest)]
    for name, found in detectors.items():
        cells = [cell([run["AUROC"][attack] for run in found], 1) for attack in first["AUROC"]]
        cells += [cell([run[key] for run in found], 1 if "AUROC" in key else 100) for key in rest]
        lines.append(row(name, str(len(found)), *cells))
    columns = ("benign on the attacked", "AutoAttack")
    if autoattack:
        lines += ["", *header("model", "seeds", "images", *columns)]
    for name, found in autoattack.items():
        images = "; ".join(dict.fromkeys(str(run["images"]) for run in found))
        lines.append(row(name, str(len(found)), images, *(cell([run[c] for run in found], 100) for c in columns)))
    return "\n".join(lines)


def recorded(file: Path) -> dict[str, Any]:
    """Return what was measured so far, by name."""
    return json.loads(file.read_text()) if file.exists() else {}


def merged(out: Path, folder: str, file: str) -> dict[str, list[dict[str, Any]]]:
    """Return what every seed found, by name."""
    together: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob(f"seed-*/{folder}/{file}")):
        for name, found in recorded(path).items():
            together.setdefault(name, []).append(found)
    return together


def parameters(settings: dict[str, Any]) -> str:
    """Format the parameters of a fusion, without what calibration asked for and reached."""
    asked = ("benign_floor", "benign_accuracy")
    return ", ".join(f"{k} {v:.3g}" for k, v in settings.items() if k not in asked and isinstance(v, float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "craft", "attack", "detect", "autoattack", "table"), nargs="+")
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    add_universal(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--heads", choices=("trained", "refitted"), default="trained")
    parser.add_argument("--encoders", type=Path, help="folder where pretrain_cifar.py left the ResNet-18s")
    parser.add_argument("--rule", default="bounded", help="fusion that detectors are measured with")
    parser.add_argument(
        "--only", nargs="*", default=[], help="fusions to attack, or detectors to measure; all by default"
    )
    parser.add_argument("--images", type=int, help="number of training images, in place of the setting's")
    parser.add_argument("--attacked", type=int, help="number of attacked test images, in place of the setting's")
    parser.add_argument(
        "--scored", type=int, help="number of test images for benign accuracy, and of validation images"
    )
    parser.add_argument("--eps", type=float, help="radius of the attacks in 255ths, in place of that of hardening")
    parser.add_argument("--epochs", type=int, help="number of epochs of every training, in place of the setting's")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for action in args.action:
        if action == "table":
            print(table(args.out, args.heads, args.eps))
        elif action == "train":
            Bench(args).train_all()
        elif action == "detect":
            Bench(args).detect(args.heads, args.rule, args.only)
        elif action == "attack":
            Bench(args).attack(args.heads, args.only)
        elif action == "autoattack":
            Bench(args).autoattack(args.heads, args.rule)
        else:
            Bench(args).craft(args.heads)


if __name__ == "__main__":
    main()

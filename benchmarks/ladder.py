"""What each defense keeps under every attacker, from the public victim alone to the white box.

    python benchmarks/ladder.py --setting digits --seed 0 --out runs/ladder-digits
    python benchmarks/ladder.py --setting cifar --seed 0 --out runs/ladder-cifar --threads 1
    python benchmarks/ladder.py --setting transfer --attackers public --out runs/ladder-transfer
    python benchmarks/ladder.py --setting resnet20 --out runs/ladder-resnet20 --threads 1
    python benchmarks/ladder.py --setting cifar --out runs/ladder-cifar --table

A defense is a preset of `ZePAD.from_encoders`, the default preset with a family of attacks left out of its bank, or one
encoder hardened by a baseline's objective for the same number of updates. The replica attacker repeats the whole
training, benign branch included, with his own seed on other images of the same kind. Models, banks, copies and attacked
images are kept in the folder, so that a run that was cut goes on. `--split validation` attacks other images than the
tables do: settings are chosen there. `--autoattack N` adds the standard version of AutoAttack by its authors
(`pip install git+https://github.com/fra31/auto-attack`) on the first N of the attacked images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import (
    MIRROR_HELP,
    add_universal,
    autoattack,
    cell,
    header,
    load_encoders,
    load_images,
    part,
    row,
    universal,
)
from public_encoders import load_public
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from zepad import Encoder, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import FeaturePGD
from zepad.data import LabelledImages
from zepad.evaluation import (
    Attacker,
    against,
    published,
    replica,
    replica_with_labels,
    semi_black_box,
    semi_black_box_plus,
    universal_feature_attack,
    white_box,
)
from zepad.evaluation.kept import keeping
from zepad.functional import restoration_gap
from zepad.fusion import Bounded
from zepad.modes import autocast
from zepad.modules import Branch
from zepad.objectives import fare, gen_af, pgd_at, restoration, trades, zepad_recipe
from zepad.presets import PRESETS
from zepad.training import fit_heads, harden_branch
from zepad.training.accelerator import use_device
from zepad.types import REFERENCE


@dataclass(frozen=True)
class Setting:
    """The data, encoders and budget of one table.

    Attributes:
        data: Data set.
        encoders: Public encoders.
        images: Number of training images; None takes all.
        replica_images: Number of training images of the attacker who repeats the defense. They follow the defender's in
            the training set, or are half of them where there are no others.
        surrogate_images: Number of images that the universal attacks are fitted to.
        attacked: Number of attacked images.
        benign: Number of images whose benign accuracy is measured.
        eps: Radius of hardening and attacks, in [0, 1] pixel units.
        size: Side of the images in pixels.
    """

    data: str
    encoders: str
    images: int | None
    replica_images: int
    surrogate_images: int
    attacked: int
    benign: int
    eps: float
    size: int = 32


SETTINGS = {
    "digits": Setting("digits", "digits", 650, 650, 650, 250, 497, 25 / 255),
    "cifar": Setting("cifar10", "cifar", 10_000, 5000, 500, 300, 5000, 8 / 255),
    # Encoders of CIFAR-10 pre-trained without labels: the ResNet-20s of benchmarks/encoders, and a GPU's ResNet-18s.
    "resnet20": Setting("cifar10", "resnet20", 10_000, 5000, 500, 300, 5000, 8 / 255),
    "resnet18": Setting("cifar10", "resnet18", 45_000, 5000, 1000, 1000, 10_000, 8 / 255),
    "imagenette": Setting("imagenette64", "cifar", 5000, 1000, 500, 300, 2000, 8 / 255, size=64),
    "transfer": Setting("digits", "cifar", 650, 650, 500, 250, 497, 8 / 255),  # far from the encoders' own data
    "tiny": Setting("digits", "digits", 64, 32, 16, 8, 16, 25 / 255),  # proves that the script runs
    "tiny16": Setting("digits", "digits", 64, 32, 16, 8, 16, 25 / 255, size=16),
}
BASELINES: dict[str, Callable[[], object]] = {
    "PGD-AT": pgd_at,
    "TRADES": trades,
    "FARE": fare,
    "Gen-AF": gen_af,
    "ZePAD's objective": zepad_recipe,
}
# The default with one of the two variants of its mixture alone. The five universal attacks are in no bank.
LEFT_OUT = {"private without MI-DI": 0, "private without PGD": 1}
UNDEFENDED = ("public victim", "public auxiliary")
GROUPS = (
    "six", "victim", "both", "third", "restrained", "unseen", "replica", "published", "replica with labels",
    "white-box", "AutoAttack",
)  # fmt: skip
LIMITS = (0.4, 0.6, 0.8)  # of the attackers who know that features are compared


@dataclass(frozen=True)
class Restrained:
    """A relative distance of features that an attack raises to a limit and no further.

    It is what an attacker wants who knows that a benign branch abstains where its features have moved far.
    """

    limit: float

    def __call__(self, moved: Tensor, clean: Tensor) -> Tensor:
        """Return the distance `(N,)` less ten times its excess over the limit."""
        distance = restoration_gap(moved, clean)
        return distance - 10 * (distance - self.limit).clamp_min(0)


class Bench:
    """Data, public encoders, and what was trained and crafted so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting, self.seed, self.universal = SETTINGS[args.setting], args.seed, args.universal
        self.split, self.epochs, self.repeats = args.split, args.epochs, args.attackers == "all"
        self.device, self.autoattacked = use_device(args.device), args.autoattack
        self.folder = args.out / f"seed-{args.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = self.setting.images
        images = load_images(
            self.setting.data,
            "train",
            shared=args.shared,
            size=self.setting.size,
            limit=None if wanted is None else wanted + self.setting.replica_images,
        )
        count = len(images) if wanted is None else min(wanted, len(images))
        self.train = part(images, torch.arange(count))
        rest = torch.arange(count, len(images))
        self.others = part(images, rest if len(rest) else torch.arange(count // 2))
        self.surrogate = Subset(self.train, range(min(len(self.train), self.setting.surrogate_images)))
        # The public encoders of CIFAR-10 saw all training images, so validation images are of the test set's end.
        test = load_images(self.setting.data, "test", shared=args.shared, size=self.setting.size)
        half = len(test) // 2
        rows = torch.arange(len(test))[half:] if args.split == "validation" else torch.arange(len(test))
        test = part(test, rows[: self.setting.benign])
        self.test = LabelledImages(test.images.to(self.device), test.labels.to(self.device), test.classes)
        self.images, self.labels = self.test.images[: self.setting.attacked], self.test.labels[: self.setting.attacked]
        encoders = load_encoders(self.setting.encoders, args.shared, args.encoders)
        self.public: tuple[Encoder, Encoder] = (encoders[0].to(self.device), encoders[1].to(self.device))
        self.third = {} if args.benign is None else {args.benign: load_public(args.benign, args.shared).to(self.device)}
        self.unseen = {}
        if self.setting.encoders == "cifar":
            self.unseen = {"cifar-resnet44": load_public("cifar-resnet44", args.shared).to(self.device)}

    # training -------------------------------------------------------------------------------------------------------

    def loader(self, data: LabelledImages) -> DataLoader:
        """Return a shuffled training loader."""
        return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def title(self, model: str) -> str:
        """Return the name of a model, with the encoder that its benign branch begins with where that is a third one."""
        return " with ".join([model, *(self.third if model in PRESETS else ())])

    def defense(self, preset: str, *, attacker: bool = False) -> tuple[ZePAD, float]:
        """Return a trained defense and the seconds that its training took, less what was found in the folder.

        Args:
            preset: Name of the preset, or of one whose bank lacks a family of attacks.
            attacker: Whether the replica attacker trains it, with another seed on other images.
        """
        name = f"{self.title(preset)} (replica)" if attacker else self.title(preset)
        folder = self.folder / "models" / name
        record = folder / "seconds.json"
        if record.exists():
            modules = zip(("victim", "auxiliary", "benign"), (*self.public, *self.third.values()), strict=False)
            encoders = dict(modules) if self.setting.encoders != "digits" else {}  # those can be rebuilt by their names
            return ZePAD.from_pretrained(folder, **encoders).to(self.device), json.loads(record.read_text())
        loader = self.loader(self.others if attacker else self.train)
        seed = self.seed + 1000 if attacker else self.seed
        benign = next(iter(self.third.values()), None)
        defense = ZePAD.from_encoders(*self.public, benign=benign, preset=preset.split()[0], num_classes=10)
        places = {"bank_dir": self.folder / "banks", "resume": True, "progress": False}
        start = time.perf_counter()
        harden = replace(defense.preset.harden, eps=self.setting.eps, seed=seed, epochs=self.epochs)
        recipe = defense.preset.objective(harden)
        if preset in LEFT_OUT:
            kept = replace(recipe.static, variants=(recipe.static.variants[LEFT_OUT[preset]],))
            recipe = restoration(static=kept, own_eps=recipe.inner.eps, augmentation=recipe.augmentation)
        digest = hashlib.sha256(recipe.name.encode()).hexdigest()[:8]  # presets that harden alike share the encoders
        checkpoints = self.folder / "epochs" / f"{digest}{' (replica)' if attacker else ''}"
        defense.harden(loader, harden, objective=recipe, checkpoint_dir=checkpoints, **places)
        benign = replace(defense.preset.benign, seed=seed, epochs=self.epochs)
        defense.fit_benign(loader, benign, checkpoint_dir=self.folder / "epochs" / f"{name} benign", **places)
        seconds = time.perf_counter() - start
        defense.save_pretrained(folder)
        record.write_text(json.dumps(round(seconds)))
        print(f"{name}: trained in {seconds:.0f} s", flush=True)
        return defense.to(self.device), seconds

    def hardened(self, name: str, *, attacker: bool = False) -> tuple[Branch, float]:
        """Return the public victim hardened by a baseline, with as many passes as a preset makes, and the seconds."""
        folder = self.folder / "models" / (f"{name} (replica)" if attacker else name)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "branch.pt"
        if not file.exists():
            seed = self.seed + 1000 if attacker else self.seed
            config = HardenConfig(eps=self.setting.eps, seed=seed, epochs=self.epochs or 6)
            loader = self.loader(self.others if attacker else self.train)
            start = time.perf_counter()
            branch, _ = harden_branch(self.public[0], loader, config, objective=BASELINES[name](), progress=False)
            torch.save((branch, time.perf_counter() - start), file)
        return torch.load(file, weights_only=False, map_location=self.device)  # written by this script

    def undefended(self, role: str) -> Branch:
        """Return a public encoder with a head."""
        encoder = self.public[UNDEFENDED.index(role)]
        heads = fit_heads(
            {role: encoder},
            self.loader(self.train),
            HeadConfig(seed=self.seed),
            channels=3,
            num_classes=10,
            progress=False,
        )
        return Branch(encoder, heads[role]).eval()

    # attacking ------------------------------------------------------------------------------------------------------

    def public_attackers(self) -> dict[str, list[Attacker]]:
        """Return the attackers who have public encoders alone."""
        common = {"eps": self.setting.eps, "seed": self.seed, "progress": False}
        loader = DataLoader(self.surrogate, batch_size=128)
        attacks = keeping(
            universal(self.universal, eps=self.setting.eps, seed=self.seed), self.folder / "perturbations"
        )
        known = semi_black_box(self.public[0], loader, universal=attacks, others=self.unseen, **common)
        count = len(attacks) + 1  # the five universal attacks and feature PGD: those of the paper's threat model
        groups = {"six": known[:count], "victim": known[count : count + 1], "unseen": known[count + 1 :]}
        return {**groups, "both": semi_black_box_plus(*self.public, loader, universal={}, **common)}

    def restrained_attackers(self) -> dict[str, list[Attacker]]:
        """Return attackers who have both public encoders and move their features no further than a limit."""
        common = {"eps": self.setting.eps, "steps": 30, "momentum": 1.0, "diversity": 0.5}
        return {
            "restrained": [
                Attacker(
                    name=f"feature MI-DI-30 within {limit:g}",
                    threat_model="semi-black-box+",
                    attack=FeaturePGD(**common, distance=Restrained(limit)),
                    target=against(*self.public),
                    precision="auto",
                )
                for limit in LIMITS
            ]
        }

    def third_attackers(self) -> dict[str, list[Attacker]]:
        """Return the attackers who know which third public encoder the benign branch began with."""
        common = {"eps": self.setting.eps, "seed": self.seed, "progress": False}
        known = semi_black_box_plus(*self.public, self.images, universal={}, further=self.third, **common)
        return {"third": known[2:]}  # the first two know victim and auxiliary alone

    def own_attackers(
        self, hardened: Mapping[str, nn.Module], copies: Mapping[str, Branch]
    ) -> dict[str, list[Attacker]]:
        """Return the attackers who repeat the training of a defense, or have its hardened encoders."""
        eps, public = self.setting.eps, {**dict(zip(UNDEFENDED, self.public, strict=True)), **self.third}
        images = Subset(self.others, range(min(len(self.others), self.setting.surrogate_images)))
        loader = DataLoader(images, batch_size=128)
        attacks = universal_feature_attack(eps=eps, seed=self.seed)
        encoders = {role: branch.encoder for role, branch in copies.items()}
        return {
            "replica": replica(encoders, public, loader, eps=eps, universal=attacks, seed=self.seed, progress=False),
            "published": published(hardened, loader, eps=eps, public=public, universal=attacks, progress=False),
            "replica with labels": replica_with_labels(copies, eps=eps),
        }

    def white_box(self, model: nn.Module) -> list[Attacker]:
        """Return the attackers who know the whole model: those of the suite but for Square, with 20 steps each."""
        return [a for a in white_box(model, eps=self.setting.eps, num_classes=10, steps=20) if "Square" not in a.name]

    def attacked(self, file: str, attackers: Callable[[], dict[str, list[Attacker]]]) -> dict[str, dict[str, Tensor]]:
        """Return the attacked images by group and attacker, crafted once: features in bfloat16 where that is native."""
        path = self.folder / "attacked" / f"{file} {self.split}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            found = {
                group: {attacker.name: self.craft(attacker, None) for attacker in members}
                for group, members in attackers().items()
            }
            torch.save(found, path)
            print(f"{file}: attacked in {time.perf_counter() - start:.0f} s", flush=True)
        return torch.load(path, weights_only=True, map_location=self.device)

    def craft(self, attacker: Attacker, model: nn.Module | None) -> Tensor:
        """Return the images as one attacker leaves them."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        target, rows = attacker.target(model), torch.arange(len(self.labels)).split(100)
        with autocast(self.device, attacker.precision):
            done = [attacker.attack(target, self.images[c], self.labels[c], generator=generator) for c in rows]
        return torch.cat(done).float()

    # scoring --------------------------------------------------------------------------------------------------------

    def score(self, model: nn.Module, attacked: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return every accuracy of one model in per cent: the least of the six, else of images that survive a group."""
        scores = {"benign": 100 * hits(model, self.test.images, self.test.labels).mean()}
        for group, members in attacked.items():
            survived = {name: hits(model, images, self.labels) for name, images in members.items()}
            if group == "white-box":
                start = time.perf_counter()
                survived = {a.name: hits(model, self.craft(a, model), self.labels) for a in self.white_box(model)}
                print(f"white box: attacked in {time.perf_counter() - start:.0f} s", flush=True)
                if self.autoattacked:
                    first, labels = self.images[: self.autoattacked], self.labels[: self.autoattacked]
                    attacked_first = autoattack(model, first, labels, eps=self.setting.eps, seed=self.seed)
                    kept = hits(model, first, labels) * hits(model, attacked_first, labels)
                    scores["AutoAttack"] = 100 * kept.mean()
            each = {name: 100 * kept.mean() for name, kept in survived.items()}
            scores |= {f"{group}: {name}": value for name, value in each.items()}
            if each:
                every = torch.stack(list(survived.values())).amin(dim=0)
                scores[group] = min(each.values()) if group == "six" else 100 * every.mean()
        return {name: round(float(value), 2) for name, value in scores.items()}

    def rows(self, name: str, votes: tuple[float, ...]) -> dict[str, dict[str, float]]:
        """Return the scores of one model, of one for each vote where it is a preset with such a fusion."""
        attacked = dict(self.attacked("public", self.public_attackers))
        attacked |= self.attacked("restrained", self.restrained_attackers)
        if name in UNDEFENDED:
            return {name: self.score(self.undefended(name), {**attacked, "white-box": {}})}
        if name in BASELINES:
            branch, seconds = self.hardened(name)
            if self.repeats:
                copies = {"victim": self.hardened(name, attacker=True)[0]}
                hardened = {"victim": branch.encoder}
                attacked |= self.attacked(name, lambda: self.own_attackers(hardened, copies))
            return {name: {**self.score(branch, {**attacked, "white-box": {}}), "seconds": round(seconds)}}
        defense, seconds = self.defense(name)
        if self.repeats:
            copy, _ = self.defense(name, attacker=True)
            copies = {role: copy.branch(role) for role in ("victim", "auxiliary", "benign")}
            hardened = {role: defense.encoder(role) for role in ("victim", "auxiliary")}
            attacked |= self.attacked(self.title(name), lambda: self.own_attackers(hardened, copies))
        if self.third:
            attacked |= self.attacked(f"public with {', '.join(self.third)}", self.third_attackers)
        name = self.title(name)
        rows, chosen = {}, (defense.fusion, defense.abstain_above)
        gaps = dict.fromkeys((defense.abstain_above, None)) if votes else (defense.abstain_above,)
        for vote in votes or (None,):
            for above in gaps:
                defense.configure(fusion=chosen[0] if vote is None else Bounded(vote=vote)).abstain_above = above
                shown = name if vote is None else f"{name}, vote {vote:g}"
                shown += ", always speaking" if above != chosen[1] else ""
                known = self.repeats and (defense.fusion, above) == chosen
                rows[shown] = {**self.score(defense, {**attacked, **({"white-box": {}} if known else {})})}
                rows[shown]["seconds"] = round(seconds)
        for role in defense.heads:
            if role != REFERENCE:
                rows[f"{name}, {role} branch alone"] = self.score(defense.branch(role), attacked)
        return rows


def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images are classified right, float32 `(N,)`."""
    with torch.no_grad():
        said = torch.cat([model(chunk).argmax(1) for chunk in images.split(500)])
    return (said == labels).float()


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Return the Markdown table of several seeds: mean and standard deviation of each score."""
    columns = ("benign", *GROUPS, "seconds")
    lines = list(header("per cent", *columns))
    for name in runs[0]:
        found = [run[name] for run in runs if name in run]
        cells = [[scores[column] for scores in found if column in scores] for column in columns]
        lines.append(row(name, *(cell([v / 100 for v in values]) if values else "" for values in cells)))
    return "\n".join(lines)


def read(file: Path) -> dict[str, dict[str, float]]:
    """Return the rows that a file holds so far."""
    return json.loads(file.read_text()) if file.exists() else {}


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Let the caller state what a `Bench` is built from, its setting and attackers aside."""
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    add_universal(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help=MIRROR_HELP)
    parser.add_argument("--epochs", type=int, help="number of passes, in place of the recipes' own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--benign", help="third public encoder that the benign branch begins with: cifar-resnet56")
    parser.add_argument("--encoders", type=Path, help="folder that pretrain_cifar.py wrote, for the ResNet-18s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*UNDEFENDED, *PRESETS, *LEFT_OUT, *BASELINES)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--models", nargs="*", choices=models, default=[*UNDEFENDED, *PRESETS])
    parser.add_argument(
        "--votes",
        nargs="*",
        type=float,
        help="votes of the rule bounded, in place of the preset's; each also with a benign branch that always speaks",
    )
    parser.add_argument(
        "--attackers",
        choices=("all", "public"),
        default="all",
        help="all, or those alone who have nothing but the public encoders: no copy is trained for them",
    )
    add_bench_options(parser)
    parser.add_argument("--autoattack", type=int, default=0, metavar="N", help="images that AutoAttack is run on")
    parser.add_argument("--table", action="store_true", help="only print the table of all seeds that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = f"{args.split}.json" if args.attackers == "all" else f"{args.split}-public.json"
    if not args.table:
        bench = Bench(args)
        file = bench.folder / name
        for model in args.models:
            known, title = read(file), bench.title(model)
            if title not in known and f"{title}, victim branch alone" not in known:
                rows = bench.rows(model, tuple(args.votes or ()))
                file.write_text(json.dumps(read(file) | rows, indent=1))  # another run may have written since
    print(table([json.loads(file.read_text()) for file in sorted(args.out.glob(f"seed-*/{name}"))]), flush=True)


if __name__ == "__main__":
    main()

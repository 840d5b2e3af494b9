r"""Recorded measurements: one JSON file for each model, from which tables and figures are drawn.

    python benchmarks/recorded.py ladder runs/ladder-cifar --setting cifar --seeds 0 --model private --out private.json
    python benchmarks/recorded.py ladder runs/ladder-cifar --setting cifar --seeds 2 --model private \
        --beside private.json --out private.json
    python benchmarks/recorded.py report comparison/mine/report.json --command "zepad compare ..." \
        --encoders "timm:resnet18 and timm:resnet34" --out mine.json

Files in `benchmarks/recorded/` appear on the leaderboard of the documentation. They hold numbers of finished runs only,
each with its command, seeds, attackers and budget.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

FOLDER = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Score:
    """An accuracy in per cent.

    Attributes:
        mean: The accuracy, or its mean over the seeds.
        deviation: Standard deviation over the seeds; None for one seed.
    """

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What is left under the attackers of one kind.

    Attributes:
        worst: Share of the images that survive every attacker of the kind.
        attackers: Share of the images that survive each of them; empty where this was not recorded.
    """

    worst: Score
    attackers: dict[str, Score]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model under the attackers that were run on it.

    Attributes:
        model: Name of the model, in Markdown.
        data: Name of the data set.
        encoders: Public encoders that the model is built on.
        eps: L-infinity radius of the attacks, as a fraction such as "8/255".
        protocol: What ran the attackers; models of one protocol met the same ones.
        images: Numbers of test images by what was measured on them, `benign` and `attacked`.
        seeds: Seeds of training and attacks.
        command: Command that measured it.
        note: What a reader has to know before comparing.
        benign: Accuracy on images as they are.
        attacked: What is left under each kind of attacker.
    """

    model: str
    data: str
    encoders: str
    eps: str
    protocol: str
    images: dict[str, int]
    seeds: list[int]
    command: str
    note: str
    benign: Score
    attacked: dict[str, Attacked]

    @property
    def comparable(self) -> tuple[object, ...]:
        """What two entries must share to stand in one table."""
        return (self.data, self.encoders, self.eps, self.protocol, *sorted(self.images.items()))


# What is measured alike has the same words in the head of its column. The order is that of the columns.
KINDS = {
    "six": "six attacks on the public victim",
    "victim": "momentum and input diversity, public victim",
    "unseen": "another public encoder",
    "semi-black-box": "public victim",
    "both": "both public encoders",
    "third": "the third public encoder, and all three",
    "restrained": "both, features kept close",
    "semi-black-box+": "both public encoders",
    "replica": "repeats the whole training",
    "replica with labels": "repeats it with your labels",
    "published": "holds the hardened encoders",
    "white-box": "knows the whole model",
}


def load(folder: Path = FOLDER) -> dict[str, Entry]:
    """Return the entries of a folder by the stems of their files."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def read(path: Path) -> Entry:
    """Return the entry of one file."""
    return TypeAdapter(Entry).validate_json(path.read_bytes())


def save(entry: Entry, path: Path) -> None:
    """Write an entry as JSON."""
    path.write_text(json.dumps(asdict(entry), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# Tables ---------------------------------------------------------------------------------------------------------------


def score(values: Sequence[float]) -> Score:
    """Return the score of one or more seeds, with the sample standard deviation, as in the other tables.

    >>> str(score([92.36])), str(score([1.0, 2.0, 3.0]))
    ('92.4', '2.0 ± 1.0')
    """
    # Tables show one decimal, and what is rounded twice may be off by one there: 44.447, 44.45, 44.5.
    return Score(round(statistics.fmean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else None)


def joined(first: Entry, second: Entry) -> Entry:
    """Return the entry of the seeds of two entries of one model, such as runs on two machines.

    Raises:
        ValueError: If they measured different things, or share a seed.
    """
    same = first.model == second.model and first.comparable == second.comparable
    attackers = [{kind: list(group.attackers) for kind, group in entry.attacked.items()} for entry in (first, second)]
    if not same or attackers[0] != attackers[1] or set(first.seeds) & set(second.seeds):
        raise ValueError(
            f"{first.model} with seeds {first.seeds} and {second.model} with seeds {second.seeds} cannot be joined: "
            "they must be one model under the same attackers, on as many images, with different seeds."
        )
    counts = len(first.seeds), len(second.seeds)

    def pooled(one: Score, other: Score) -> Score:
        return _pooled((one, other), counts)

    return replace(
        first,
        seeds=sorted([*first.seeds, *second.seeds]),
        command="\n".join(sorted([*first.command.splitlines(), *second.command.splitlines()])),
        benign=pooled(first.benign, second.benign),
        attacked={
            kind: Attacked(
                worst=pooled(group.worst, second.attacked[kind].worst),
                attackers={n: pooled(s, second.attacked[kind].attackers[n]) for n, s in group.attackers.items()},
            )
            for kind, group in first.attacked.items()
        },
    )


def _pooled(scores: tuple[Score, Score], counts: tuple[int, int]) -> Score:
    """Return mean and deviation of two samples together (Chan, Golub and LeVeque 1983, equations 2.1)."""
    (one, other), (m, n) = scores, counts
    apart = other.mean - one.mean
    squares = (m - 1) * (one.deviation or 0) ** 2 + (n - 1) * (other.deviation or 0) ** 2 + apart**2 * m * n / (m + n)
    return Score(round(one.mean + apart * n / (m + n), 4), round(math.sqrt(squares / (m + n - 1)), 4))


def cell(entry: Entry, kind: str) -> str:
    """Return what is left under the attackers of a kind, or a dash where they were not run."""
    return str(entry.attacked[kind].worst) if kind in entry.attacked else "—"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  |", " |") for line in lines)


def leaderboard(entries: Mapping[str, Entry]) -> str:
    """Return one table for each set of comparable entries, the model first that keeps most, and how it was measured."""
    groups: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries.values():
        groups[entry.comparable].append(entry)
    return "\n\n".join(_board(group) for group in groups.values())


def _board(entries: Sequence[Entry]) -> str:
    first = entries[0]
    title = f"{first.data}, eps {first.eps}, {first.protocol}"
    kinds = [kind for kind in KINDS if any(kind in entry.attacked for entry in entries)]
    ranked = sorted(entries, key=lambda entry: entry.attacked[kinds[0]].worst.mean, reverse=True)
    rows = [[entry.model, str(entry.benign), *(cell(entry, kind) for kind in kinds)] for entry in ranked]
    blocks = [
        f"## {title}",
        f"The public encoders are {first.encoders}. Numbers are per cent, of {first.images['benign']:,} benign and "
        f"{first.images['attacked']:,} attacked test images.",
        table(["model", "no attack", *(KINDS[kind] for kind in kinds)], rows),
        f"### How it was measured: {title}",
    ]
    for entry in ranked:
        seeds = ", ".join(map(str, entry.seeds))
        note = f" {entry.note}" if entry.note else ""
        plural = "seeds" if len(entry.seeds) > 1 else "seed"
        blocks.append(f"**{entry.model}**, {plural} {seeds}.{note}\n\n```bash\n{entry.command}\n```")
    return "\n\n".join(blocks)


SUMMARY = ("cifar-undefended", "cifar-fare", "cifar-private", "cifar-published")
SUMMARY_KINDS = ("six", "both", "restrained", "replica", "published", "white-box")


def summary(entries: Mapping[str, Entry]) -> str:
    """Return the small table of README and landing page: attackers down, models across."""
    models = [entries[name] for name in SUMMARY]
    rows = [["no attack", *(str(entry.benign) for entry in models)]]
    rows += [[KINDS[kind], *(cell(entry, kind) for entry in models)] for kind in SUMMARY_KINDS]
    return table(["attacker", *(entry.model for entry in models)], rows)


# Recording ------------------------------------------------------------------------------------------------------------

LADDER_NAMES = {"public victim": "undefended", "public auxiliary": "undefended auxiliary"}


def from_ladder(folder: Path, *, setting: str, seeds: Sequence[int], model: str, file: str = "test.json") -> Entry:
    """Return the entry of one model of `ladder.py`.

    Args:
        folder: Folder of the runs, which holds `seed-0` and so on.
        setting: Setting of the run.
        seeds: Seeds to record.
        model: Name of the model in the run.
        file: File of the scores.
    """
    from ladder import BASELINES, GROUPS, SETTINGS

    of, (trained, _, third) = SETTINGS[setting], model.partition(" with ")
    runs = [json.loads((folder / f"seed-{seed}" / file).read_text())[model] for seed in seeds]
    attacked = {
        kind: Attacked(
            worst=score([run[kind] for run in runs]),
            attackers={
                name.partition(": ")[2]: score([run[name] for run in runs])
                for name in runs[0]
                if name.startswith(f"{kind}: ")
            },
        )
        for kind in GROUPS
        if all(kind in run for run in runs)
    }
    public = " --attackers public" if file == "test-public.json" else ""
    benign = f" --benign {third}" if third else ""
    note = f"Trained on {of.images:,} images." if model not in LADDER_NAMES and of.images else ""
    if third:
        note += f" Its benign branch begins with a third public encoder, {third}."
    if model in BASELINES:
        shown = f"{model}, one encoder"
    else:
        shown = LADDER_NAMES.get(model, f"zepad, `{trained}`{', third encoder' if third else ''}")
    return Entry(
        model=shown,
        data={"cifar10": "CIFAR-10", "digits": "digits", "imagenette64": "Imagenette"}[of.data],
        encoders={
            "cifar": "a supervised ResNet-20 and ResNet-32",
            "digits": "the packaged Barlow Twins and SimCLR",
            "resnet20": "ResNet-20s by Barlow Twins and SimCLR, without labels",
        }[of.encoders],
        eps=f"{of.eps * 255:g}/255",
        protocol="the attackers of `benchmarks/ladder.py`",
        images={"benign": of.benign, "attacked": of.attacked},
        seeds=list(seeds),
        command="\n".join(
            f"python benchmarks/ladder.py --setting {setting} --seed {seed} "
            f'--models "{trained}"{benign}{public} --out runs/ladder-{setting}'
            for seed in seeds
        ),
        note=note,
        benign=score([run["benign"] for run in runs]),
        attacked=attacked,
    )


def from_report(path: Path, *, command: str, encoders: str) -> Entry:
    """Return the entry of a model that `zepad evaluate` or `zepad compare` measured.

    Args:
        path: File `report.json` of the model.
        command: Command that wrote it.
        encoders: Public encoders that the model is built on.
    """
    from zepad.evaluation import EvalReport

    report = EvalReport.load(path)
    groups = [group for group in KINDS if group in report.groups]
    (eps,) = {row.eps for group in groups for row in report.group(group)}
    attacked = {
        group: Attacked(
            worst=score([100 * report.worst[group].robust_accuracy.value]),
            attackers={row.name: score([100 * row.rates.robust_accuracy.value]) for row in report.group(group)},
        )
        for group in groups
    }
    return Entry(
        model=report.model,
        data=report.data,
        encoders=encoders,
        eps=f"{eps * 255:g}/255",
        protocol="the attackers of `zepad evaluate`",
        images={"benign": report.benign_accuracy.total, "attacked": report.benign_accuracy.total},
        seeds=[report.provenance["seed"]],
        command=command,
        note="",
        benign=score([100 * report.benign_accuracy.value]),
        attacked=attacked,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    ladder = kinds.add_parser("ladder", help="a model of ladder.py")
    ladder.add_argument("folder", type=Path)
    ladder.add_argument("--setting", required=True)
    ladder.add_argument("--seeds", type=int, nargs="+", default=[0])
    ladder.add_argument("--model", required=True)
    ladder.add_argument("--beside", type=Path, help="recorded file of other seeds, which these are joined to")
    ladder.add_argument("--file", default="test.json", help="test-public.json where only public attackers ran")
    report = kinds.add_parser("report", help="a report.json of zepad evaluate or zepad compare")
    report.add_argument("path", type=Path)
    report.add_argument("--command", required=True, help="command that wrote the report")
    report.add_argument("--encoders", required=True, help="public encoders that the model is built on")
    for each in (ladder, report):
        each.add_argument("--out", type=Path, required=True, help="JSON file; those of benchmarks/recorded/ are shown")
    args = parser.parse_args()
    if args.kind == "ladder":
        entry = from_ladder(args.folder, setting=args.setting, seeds=args.seeds, model=args.model, file=args.file)
        if args.beside is not None:
            entry = joined(read(args.beside), entry)
    else:
        entry = from_report(args.path, command=args.command, encoders=args.encoders)
    save(entry, args.out)


if __name__ == "__main__":
    main()

"""Commands that attack and measure: `zepad attack`, `zepad evaluate`, `zepad compare`."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InputError
from ..files import write_together, writing
from .ending import interruptible
from .root import JSON_OPTION, QUIET, SEED, app, say
from .settings import EPS, parse_eps
from .sources import BATCH, BATCH_SIZE, DATA, DEVICE, DOWNLOAD, ROOT, SIZE, WORKERS, Source, find_device

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from ..encoders import Encoder, EncoderSpec
    from ..evaluation import EvalReport, UniversalAttack
    from ..model import ZePAD
    from ..types import Role

VICTIM = typer.Option(metavar="SPEC", help="Public victim encoder; by default the first saved model's.")
AUXILIARY = typer.Option(metavar="SPEC", help="Public auxiliary encoder; by default the saved model's.")
BENIGN = typer.Option(
    metavar="SPEC", help="Third public encoder, which the benign branch began with; by default the saved model's."
)
UNIVERSAL = typer.Option(metavar="NAMES", help="Universal attacks to fit, separated by commas; an empty text for none.")
FIVE = "AdvEncoder,PAP,UAP,UAPGD,SSP"
STEPS = typer.Option(min=1, metavar="NUMBER", help="Number of APGD steps.")
QUERIES = typer.Option(min=1, metavar="NUMBER", help="Number of Square queries per image.")
LIMIT = typer.Option(min=1, metavar="NUMBER", help="Evaluate this many test images at most.")
TRAIN_LIMIT = typer.Option(min=1, metavar="NUMBER", help="Give the attacker this many images at most.")
PERTURBATIONS = typer.Option(metavar="FILE", help="File that zepad attack wrote; repeat for more.")
REPLICA = typer.Option(
    "--replica",
    metavar="SOURCE",
    help="Attack copies too that repeat the training of the model on these images, another data set than the model's. "
    "This trains two or three encoders, once.",
)


@app.command()
def attack(
    encoders: Annotated[
        list[str], typer.Argument(metavar="SPEC...", help="Public encoders, such as timm:resnet18; several at once.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, *.safetensors.")],
    data: Annotated[str, DATA] = "digits",
    method: Annotated[str, typer.Option(metavar="NAME", help="AdvEncoder, PAP, UAP, UAPGD or SSP.")] = "AdvEncoder",
    eps: Annotated[str, EPS] = "10/255",
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the data: train or test.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, metavar="NUMBER", help="Use this many images at most.")] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Craft a universal perturbation on public encoders and save it."""
    with interruptible(f"Nothing is kept, and {out} is not written."):
        chosen = _chosen_attacks([method], parse_eps(eps), seed)[method]
        place = find_device(device)
        attacked = [_encoder(name).to(place) for name in encoders]
        source = Source(size=size, root=root, download=download, seed=seed, workers=workers, batch_size=batch_size)
        part: Any = split
        perturbation = chosen.fit(attacked, source.split(data, part, limit=limit), progress=not (quiet or as_json))
        perturbation.save(out)
    images = perturbation.provenance["images"]
    if as_json:
        said = {"path": str(out), "attack": method, "eps": perturbation.eps, "norm": "linf", "images": images}
        say(json.dumps(said))
        return
    say(f"{method}, eps {perturbation.eps * 255:.3g}/255, {images} images of {data}: {out}")
    say(f"Next: zepad evaluate MODEL --data {data} --perturbation {out} --out report")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or an encoder to classify with undefended.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the report; what is there already is not computed again.")
    ],
    data: Annotated[str, DATA] = "digits",
    eps: Annotated[str, EPS] = "10/255",
    steps: Annotated[int, STEPS] = 50,
    queries: Annotated[int, QUERIES] = 1000,
    victim: Annotated[str | None, VICTIM] = None,
    auxiliary: Annotated[str | None, AUXILIARY] = None,
    benign: Annotated[str | None, BENIGN] = None,
    universal: Annotated[str, UNIVERSAL] = FIVE,
    perturbation: Annotated[list[Path] | None, PERTURBATIONS] = None,
    replica: Annotated[str | None, REPLICA] = None,
    limit: Annotated[int | None, LIMIT] = None,
    train_limit: Annotated[int | None, TRAIN_LIMIT] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Attack a model in every way there is and write report.html, report.md, report.json and report.png.

    The attackers' images are the train split of the data, and the test split is scored. The encoders of a saved model
    are also attacked themselves, as everybody can who has them from the Hub. The report shows a classifier on the
    undefended victim encoder beside the saved model.
    """
    source = Source(size=size, root=root, download=download, seed=seed, workers=workers, batch_size=batch_size)
    with interruptible(_kept(out)):
        from ..evaluation import save_report

        reports = _measure(
            [model],
            out,
            data=data,
            source=source,
            device=device,
            eps=eps,
            steps=steps,
            queries=queries,
            victim=victim,
            auxiliary=auxiliary,
            benign=benign,
            universal=universal,
            perturbation=perturbation,
            replica=replica,
            limit=limit,
            train_limit=train_limit,
            progress=not (quiet or as_json),
            beside=True,
        )
        (report,) = reports.values()
        save_report(report, out)
    if as_json:
        say(json.dumps(json.loads(report.to_json())))
        return
    from ..evaluation.rendering import summary

    say(summary(report))
    say(f"report    {out / 'report.html'}")


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Saved models, undefended encoders, or folders of reports."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the reports and of compare.html and compare.md.")
    ],
    data: Annotated[str, DATA] = "digits",
    eps: Annotated[str, EPS] = "10/255",
    steps: Annotated[int, STEPS] = 50,
    queries: Annotated[int, QUERIES] = 1000,
    victim: Annotated[str | None, VICTIM] = None,
    auxiliary: Annotated[str | None, AUXILIARY] = None,
    benign: Annotated[str | None, BENIGN] = None,
    universal: Annotated[str, UNIVERSAL] = FIVE,
    perturbation: Annotated[list[Path] | None, PERTURBATIONS] = None,
    limit: Annotated[int | None, LIMIT] = None,
    train_limit: Annotated[int | None, TRAIN_LIMIT] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Put several defenses side by side: one table, every model under the same attackers.

    Folders that hold a report.json are read; everything else is evaluated first, as by zepad evaluate.
    """
    source = Source(size=size, root=root, download=download, seed=seed, workers=workers, batch_size=batch_size)
    with interruptible(_kept(out)):
        from ..evaluation import EvalReport
        from ..evaluation.rendering import comparison_html, comparison_markdown
        from ..protocols import save_reports

        done = {name: EvalReport.load(name) for name in models if (Path(name) / "report.json").exists()}
        todo = [name for name in models if name not in done]
        measured: dict[str, EvalReport] = {}
        if todo:
            measured = _measure(
                todo,
                out,
                data=data,
                source=source,
                device=device,
                eps=eps,
                steps=steps,
                queries=queries,
                victim=victim,
                auxiliary=auxiliary,
                benign=benign,
                universal=universal,
                perturbation=perturbation,
                limit=limit,
                train_limit=train_limit,
                progress=not (quiet or as_json),
            )
            save_reports({report.model: report for report in measured.values()}, out)
        reports = [done[name] if name in done else measured[name] for name in models]
        table = comparison_markdown(reports)
        with writing(out, InputError):
            write_together(out, {"compare.md": table.encode(), "compare.html": comparison_html(reports).encode()})
    if as_json:
        said = {name: report.summary() for name, report in zip(models, reports, strict=True)}
        say(json.dumps({"page": str(out / "compare.html"), "models": said}))
        return
    say(table)
    say(f"page      {out / 'compare.html'}")


def _kept(out: Path) -> str:
    return f"Kept: what every attacker did so far, in {out}. None of it is computed again."


def _measure(
    names: list[str],
    out: Path,
    *,
    data: str,
    source: Source,
    device: str | None,
    eps: str,
    steps: int,
    queries: int,
    victim: str | None,
    auxiliary: str | None,
    benign: str | None,
    universal: str,
    perturbation: list[Path] | None,
    replica: str | None = None,
    limit: int | None,
    train_limit: int | None,
    progress: bool,
    beside: bool = False,
) -> dict[str, EvalReport]:
    """Return the report on each model by the name it was given, the undefended victim's beside it where asked for."""
    from ..attacks import UniversalPerturbation
    from ..evaluation import accuracy, with_baseline
    from ..evaluation.resuming import check_resumable
    from ..model import ZePAD
    from ..protocols import Protocol, measure, replica_of, state_folder

    if replica is not None and not any(Path(name).is_dir() for name in names):
        raise ConfigError("--replica repeats the training of a saved model, and an undefended encoder has none.")
    budget, seed = parse_eps(eps), source.seed
    attacks = _chosen_attacks([name for name in universal.split(",") if name], budget, seed)
    protocol = Protocol(eps=budget, universal=attacks, steps=steps, queries=queries, seed=seed, progress=progress)
    saved = [UniversalPerturbation.load(path) for path in perturbation or ()]
    place = find_device(device)
    test = source.split(data, "test", limit=limit)
    surrogate = source.split(data, "train", limit=train_limit)
    classes = len(test.dataset.classes)  # type: ignore[attr-defined]
    models: dict[str, nn.Module] = {}
    shown = _shown_names(names)
    for name in names:
        if Path(name).is_dir():
            models[shown[name]] = ZePAD.from_pretrained(name, device=place)
        else:
            models[shown[name]] = _undefended(name, _encoder(name), surrogate, classes, seed, progress)
    defense = next((model for model in models.values() if isinstance(model, ZePAD)), None)
    given = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
    for name, model in models.items():  # before anything is trained or crafted
        check_resumable(state_folder(out, name), model, test, seed=seed)
    public = _public_encoders(defense, {role: text for role, text in given.items() if text is not None})
    public = {role: encoder.to(place) for role, encoder in public.items()}
    if not public:
        say("No public encoder is known: pass --victim for semi-black-box attackers.", err=True)
    baseline = None
    if beside and defense is not None and defense.stage == "fitted" and "victim" in public:
        if defense.reference is not None and victim is None:  # it has the head that was fitted with the model's own
            bare: nn.Module = copy.deepcopy(defense.reference)
        else:
            bare = _undefended("victim", public["victim"], surrogate, classes, seed, progress)
        if accuracy(bare, test).hits:
            baseline = f"undefended {defense.encoder('victim').spec}"
            models[baseline] = bare
        else:
            say("The undefended victim classifies no image right, so the report does not show it.", err=True)
    copies: dict[str, Encoder] | None = None
    if replica is not None:
        assert defense is not None
        own = source.split(replica, "train", limit=train_limit, shuffle=True)
        copies = replica_of(defense, public, own, folder=out / "replica", progress=progress)
    reports = measure(
        models,
        test,
        public=public,
        surrogate=surrogate,
        num_classes=classes,
        data=f"{data} (test)",
        protocol=protocol,
        folder=out,
        perturbations=saved,
        copies=copies,
    )
    found = {name: reports[shown[name]] for name in names}
    if baseline is None:
        return found
    return {name: with_baseline(report, reports[baseline]) for name, report in found.items()}


def _shown_names(names: list[str]) -> dict[str, str]:
    """Return what a report calls each model: of a folder the last part of its path, unless two share it."""
    short = {name: Path(name).resolve().name if Path(name).is_dir() else name for name in names}
    return {name: said if [*short.values()].count(said) == 1 else name for name, said in short.items()}


def _chosen_attacks(names: list[str], eps: float, seed: int) -> dict[str, UniversalAttack]:
    from ..evaluation import universal_attacks

    attacks = universal_attacks(eps=eps, seed=seed)
    unknown = [name for name in names if name not in attacks]
    if unknown:
        raise ConfigError(f"universal attacks are {', '.join(attacks)}; got {', '.join(unknown)}.")
    return {name: attacks[name] for name in names}


def _public_encoders(defense: ZePAD | None, given: dict[str, str]) -> dict[str, Encoder]:
    """Return the public encoders: those given, and of the others those that a saved model holds or can name."""
    from ..protocols.replicas import has_third
    from ..types import HARDENED_ROLES, ROLES

    public: dict[str, Encoder] = {}
    third = defense is not None and has_third(defense)
    for role in ROLES if third or "benign" in given else HARDENED_ROLES:
        saved = None if defense is None else defense.encoder(role).spec
        if role in given:
            public[role] = _encoder(given[role], saved)
        elif defense is not None:
            found = _public_encoder(defense, role)
            public |= {} if found is None else {role: found}
    return public


def _public_encoder(defense: ZePAD, role: Role) -> Encoder | None:
    """Return an encoder that a saved model started from; None where only its owner can say which weights it had."""
    from ..protocols import public_encoder

    try:
        return public_encoder(defense, role)
    except ConfigError as error:  # a module of the owner's, or weights from a file or of a tag, which no config names
        spec = defense.encoder(role).spec
        source = "SOURCE" if spec.source == "custom" else spec.source
        say(
            f"The public {role} is not known, so no attacker has it: {error} "
            f"Here: --{role} {source}:... names the encoder as it was before any hardening.",
            err=True,
        )
        return None


def _encoder(name: str, saved: EncoderSpec | None = None) -> Encoder:
    """Return the encoder of a spec string, whose weights are used as a saved model uses those of the same source."""
    from ..encoders import EncoderSpec, build_encoder

    spec = EncoderSpec.parse(name)
    if saved is not None and spec.weights and spec.source == saved.source and spec.name in ("", saved.name):
        spec = replace(saved, weights=spec.weights)
    return build_encoder(spec, pretrained=True)


def _undefended(
    name: str, encoder: Encoder, loader: DataLoader[Any], classes: int, seed: int, progress: bool
) -> nn.Module:
    """Return a public encoder with a head fitted to the task, which a defense is compared with."""
    from ..config import HeadConfig
    from ..encoders import probe
    from ..modules import Branch
    from ..training import fit_heads

    heads = fit_heads(
        {name: encoder},
        loader,
        HeadConfig(seed=seed),
        channels=probe(encoder)[0],
        num_classes=classes,
        progress=progress,
    )
    return Branch(encoder, heads[name]).eval()

"""Commands that attack and measure: `zepad attack`, `zepad evaluate`, `zepad compare`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InputError
from ..files import write_together
from .root import JSON_OPTION, app, say

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from ..encoders import Encoder, EncoderSpec
    from ..evaluation import EvalReport, UniversalAttack
    from ..model import ZePAD
    from ..types import Role

_BATCH = 128

DATA = typer.Option(help="digits, cifar10, stl10, gtsrb, svhn, animals10, imagenet20, folder:PATH or a .npz file.")
ROOT = typer.Option(help="Folder of the named data sets.")
DOWNLOAD = typer.Option("--download", help="Fetch a named data set that is missing.")
SIZE = typer.Option(min=1, help="Resize images to this height and width.")
EPS = typer.Option(help="L-infinity budget in [0, 1] pixel units, such as 10/255.")
SEED = typer.Option(min=0, help="Seed of attacks and random subsets.")
UNIVERSAL = typer.Option(help="Universal attacks to fit, separated by commas; an empty text for none.")
FIVE = "AdvEncoder,PAP,UAP,UAPGD,SSP"
STEPS = typer.Option(min=1, help="Number of APGD steps.")
QUERIES = typer.Option(min=1, help="Number of Square queries per image.")
LIMIT = typer.Option(min=1, help="Evaluate this many test images at most.")
TRAIN_LIMIT = typer.Option(min=1, help="Give the attacker this many images at most.")
PERTURBATIONS = typer.Option(help="File that zepad attack wrote; repeat for more.")
REPLICA = typer.Option(
    "--replica",
    metavar="DATA",
    help="Attack copies too that repeat the hardening of the model on these images, another data set than the model's. "
    "This trains two encoders, once.",
)
QUIET = typer.Option("--quiet", help="Show no progress.")


def parse_eps(text: str) -> float:
    """Read a budget such as `10/255` or `0.04`.

    Raises:
        ConfigError: If it is no number, or lies outside (0, 1].
    """
    from ..config import check_budget

    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.]+)\s*)?", text)
    try:
        if match is None:
            raise ValueError
        eps = float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"eps must be a number or a fraction such as 10/255; got {text!r}.") from None
    check_budget(eps)
    return eps


@app.command()
def attack(
    encoders: Annotated[list[str], typer.Argument(help="Public encoders, such as timm:resnet18; several at once.")],
    out: Annotated[Path, typer.Option(help="File to write, *.safetensors.")],
    data: Annotated[str, DATA] = "digits",
    method: Annotated[str, typer.Option(help="AdvEncoder, PAP, UAP, UAPGD or SSP.")] = "AdvEncoder",
    eps: Annotated[str, EPS] = "10/255",
    split: Annotated[str, typer.Option(help="Split of the data: train or test.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images at most.")] = None,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Craft a universal perturbation on public encoders and save it."""
    chosen = _chosen_attacks([method], parse_eps(eps), seed)[method]
    attacked = [_encoder(name) for name in encoders]
    loader = _loader(data, split, limit=limit, size=size, root=root, download=download, seed=seed)
    perturbation = chosen.fit(attacked, loader, progress=not quiet)
    perturbation.save(out)
    say(f"{method}, eps {perturbation.eps * 255:.3g}/255, {perturbation.provenance['images']} images of {data}: {out}")
    say(f"Next: zepad evaluate MODEL --data {data} --perturbation {out} --out report")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a saved model, or an encoder to classify with undefended.")],
    out: Annotated[Path, typer.Option(help="Folder of the report; what is there already is not computed again.")],
    data: Annotated[str, DATA] = "digits",
    eps: Annotated[str, EPS] = "10/255",
    steps: Annotated[int, STEPS] = 50,
    queries: Annotated[int, QUERIES] = 1000,
    victim: Annotated[str | None, typer.Option(help="Public victim encoder; by default the saved model's.")] = None,
    auxiliary: Annotated[
        str | None, typer.Option(help="Public auxiliary encoder; by default the saved model's.")
    ] = None,
    universal: Annotated[str, UNIVERSAL] = FIVE,
    perturbation: Annotated[list[Path] | None, PERTURBATIONS] = None,
    replica: Annotated[str | None, REPLICA] = None,
    limit: Annotated[int | None, LIMIT] = None,
    train_limit: Annotated[int | None, TRAIN_LIMIT] = None,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Attack a model in every way there is and write report.html, report.md, report.json and report.png.

    The attackers' images are the train split of the data, and the test split is scored. The encoders of a saved model
    are also attacked themselves, as everybody can who has them from the Hub.
    """
    from ..evaluation import save_report
    from ..evaluation.rendering import markdown_tables

    reports = _measure(
        [model],
        out,
        data=data,
        eps=eps,
        steps=steps,
        queries=queries,
        victim=victim,
        auxiliary=auxiliary,
        universal=universal,
        perturbation=perturbation,
        replica=replica,
        limit=limit,
        train_limit=train_limit,
        size=size,
        root=root,
        download=download,
        seed=seed,
        progress=not (quiet or as_json),
    )
    (report,) = reports.values()
    save_report(report, out)
    if as_json:
        say(json.dumps(json.loads(report.to_json())))
        return
    say(markdown_tables(report))
    say(f"report    {out / 'report.html'}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Saved models, undefended encoders, or folders of reports.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports and of compare.html and compare.md.")],
    data: Annotated[str, DATA] = "digits",
    eps: Annotated[str, EPS] = "10/255",
    steps: Annotated[int, STEPS] = 50,
    queries: Annotated[int, QUERIES] = 1000,
    victim: Annotated[
        str | None, typer.Option(help="Public victim encoder; by default the first saved model's.")
    ] = None,
    auxiliary: Annotated[
        str | None, typer.Option(help="Public auxiliary encoder; by default the saved model's.")
    ] = None,
    universal: Annotated[str, UNIVERSAL] = FIVE,
    perturbation: Annotated[list[Path] | None, PERTURBATIONS] = None,
    limit: Annotated[int | None, LIMIT] = None,
    train_limit: Annotated[int | None, TRAIN_LIMIT] = None,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    seed: Annotated[int, SEED] = 0,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Put several defenses side by side: one table, every model under the same attackers.

    Folders that hold a report.json are read; everything else is evaluated first, as by zepad evaluate.
    """
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
            eps=eps,
            steps=steps,
            queries=queries,
            victim=victim,
            auxiliary=auxiliary,
            universal=universal,
            perturbation=perturbation,
            limit=limit,
            train_limit=train_limit,
            size=size,
            root=root,
            download=download,
            seed=seed,
            progress=not quiet,
        )
        save_reports(measured, out)
    reports = [done[name] if name in done else measured[name] for name in models]
    table = comparison_markdown(reports)
    try:
        write_together(out, {"compare.md": table.encode(), "compare.html": comparison_html(reports).encode()})
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}. Choose a writable folder.") from error
    say(table)
    say(f"page      {out / 'compare.html'}")


def _measure(
    names: list[str],
    out: Path,
    *,
    data: str,
    eps: str,
    steps: int,
    queries: int,
    victim: str | None,
    auxiliary: str | None,
    universal: str,
    perturbation: list[Path] | None,
    replica: str | None = None,
    limit: int | None,
    train_limit: int | None,
    size: int | None,
    root: Path | None,
    download: bool,
    seed: int,
    progress: bool,
) -> dict[str, EvalReport]:
    from ..attacks import UniversalPerturbation
    from ..evaluation.resuming import check_resumable
    from ..model import ZePAD
    from ..protocols import Protocol, measure, replica_of, state_folder

    if replica is not None and not any(Path(name).is_dir() for name in names):
        raise ConfigError("--replica repeats the hardening of a saved model, and an undefended encoder has none.")
    budget = parse_eps(eps)
    attacks = _chosen_attacks([name for name in universal.split(",") if name], budget, seed)
    protocol = Protocol(eps=budget, universal=attacks, steps=steps, queries=queries, seed=seed, progress=progress)
    source: dict[str, Any] = {"size": size, "root": root, "download": download, "seed": seed}
    saved = [UniversalPerturbation.load(path) for path in perturbation or ()]
    test = _loader(data, "test", limit=limit, **source)
    surrogate = _loader(data, "train", limit=train_limit, **source)
    models: dict[str, nn.Module] = {}
    for name in names:
        if Path(name).is_dir():
            models[name] = ZePAD.from_pretrained(name)
        else:
            models[name] = _undefended(name, surrogate, len(test.dataset.classes), seed, progress)  # type: ignore[attr-defined]
    defense = next((model for model in models.values() if isinstance(model, ZePAD)), None)
    given = {"victim": victim, "auxiliary": auxiliary}
    for name, model in models.items():  # before anything is trained or crafted
        check_resumable(state_folder(out, name), model, test, seed=seed)
    public = _public_encoders(defense, {role: text for role, text in given.items() if text is not None})
    if not public:
        say("No public encoder is known: pass --victim for semi-black-box attackers.", err=True)
    copies: dict[str, Encoder] | None = None
    if replica is not None:
        assert defense is not None
        own = _loader(replica, "train", limit=train_limit, shuffle=True, **source)
        copies = replica_of(defense, public, own, folder=out / "replica", progress=progress)
    return measure(
        models,
        test,
        public=public,
        surrogate=surrogate,
        num_classes=len(test.dataset.classes),  # type: ignore[attr-defined]
        data=f"{data} (test)",
        protocol=protocol,
        folder=out,
        perturbations=saved,
        copies=copies,
    )


def _chosen_attacks(names: list[str], eps: float, seed: int) -> dict[str, UniversalAttack]:
    from ..evaluation import universal_attacks

    attacks = universal_attacks(eps=eps, seed=seed)
    unknown = [name for name in names if name not in attacks]
    if unknown:
        raise ConfigError(f"universal attacks are {', '.join(attacks)}; got {', '.join(unknown)}.")
    return {name: attacks[name] for name in names}


def _public_encoders(defense: ZePAD | None, given: dict[str, str]) -> dict[str, Encoder]:
    """Return the public encoders: those given, and of the others those that a saved model holds or can name."""
    from ..types import HARDENED_ROLES

    public: dict[str, Encoder] = {}
    for role in HARDENED_ROLES:
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


def _undefended(name: str, loader: DataLoader[Any], classes: int, seed: int, progress: bool) -> nn.Module:
    """Return a public encoder with a head fitted to the task, which a defense is compared with."""
    from ..config import HeadConfig
    from ..encoders import probe
    from ..modules import Branch
    from ..training import fit_heads

    encoder = _encoder(name)
    heads = fit_heads(
        {name: encoder},
        loader,
        HeadConfig(seed=seed),
        channels=probe(encoder)[0],
        num_classes=classes,
        progress=progress,
    )
    return Branch(encoder, heads[name]).eval()


def _loader(data: str, split: str, *, shuffle: bool = False, **settings: Any) -> DataLoader[Any]:
    from torch.utils.data import DataLoader

    from ..data import load_data

    return DataLoader(load_data(data, split, **settings), batch_size=_BATCH, shuffle=shuffle)  # type: ignore[arg-type]

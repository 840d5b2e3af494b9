"""Commands that show, describe and use a model: `zepad demo`, `zepad info`, `zepad predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..escaping import clean
from .ending import interruptible
from .root import JSON_OPTION, MODEL, QUIET, SEED, app, say
from .sources import BATCH, BATCH_SIZE, DEVICE, SIZE, WORKERS, load_model

_SHOWN = 5  # names of images that an error lists


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for the picture, the numbers and the saved model.")
    ] = Path("zepad-demo"),
    seed: Annotated[int, SEED] = 0,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Attack two public encoders, harden them, and compare: real images, no network, a minute or two on two cores."""
    with interruptible("The demo keeps nothing: it takes a minute or two."):
        from ..demo import format_table, run_demo

        quiet = as_json
        result = run_demo(
            out,
            seed=seed,
            progress=not quiet,
            say=(lambda _: None) if quiet else (lambda line: say(line, err=True)),
        )
    if as_json:
        say(result.to_json())
        return
    say(f"\n{format_table(result)}\n")
    say(f"picture   {out / 'picture.png'}")
    say(f"report    {out / 'report' / 'report.html'}")
    say(f"model     {out / 'model'}   (reloaded: predictions equal)")
    say(f"numbers   {out / 'result.json'}")
    say(f"time      {result.seconds:.0f} s\n")
    say(f"Next: zepad info {out / 'model'}")


@app.command()
def info(
    path: Annotated[Path, MODEL],
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Say what a saved model is, from its config alone."""
    from ..persistence import read_config
    from ..persistence.config import CONFIG_FILE

    config = read_config(path / CONFIG_FILE)
    if as_json:
        say(json.dumps(config.to_dict()))
        return
    shown = config.class_names if config.class_names and len(config.class_names) <= 20 else ()
    names = f" ({', '.join(map(clean, shown))})" if shown else ""
    say(f"stage       {config.stage}")
    say(f"classes     {config.num_classes or 'none yet'}{names}")
    say(f"fusion      {config.fusion_rule.summary()}")
    threshold = "none yet: calibrate it" if config.threshold is None else f"{config.threshold:.4g}"
    say(f"detector    {config.detector_rule.summary()}, threshold {threshold}")
    for role, record in config.encoders.items():
        preprocessing = record.spec.preprocessing
        size = "x".join(map(str, preprocessing.size)) if preprocessing and preprocessing.size else "any size"
        say(f"{role:<11} {record.spec}, {record.features} features, images {size}")
    hardening = config.provenance.get("harden")
    if hardening:
        say(f"hardened    {_hardening(hardening)}")
    if config.base is not None:
        say(f"base        {config.base.repo_id} at {config.base.revision}, which has the encoders")
    say(f"files       {sum(file.bytes for file in config.files.values()) / 1e6:.1f} MB in {len(config.files)} files")
    say(f"written by  zepad {clean(config.library_version)}, format {config.format}")


@app.command()
def predict(
    model: Annotated[Path, MODEL],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", exists=True, help="Image files, folders of them, or .tar archives."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table to write: .csv, .jsonl or .parquet. Images that are in it are not predicted again.",
        ),
    ] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Classify images and say which look attacked.

    Without --out the predictions are printed. With it they are kept as they come, an interrupted run goes on where it
    was, and images that cannot be read become rows that say why.
    """
    if out is None:
        with interruptible("Without --out no prediction is kept."):
            _print_predictions(model, images, batch_size, size, workers, device, as_json)
        return
    with interruptible(f"Kept: the predictions so far, in {out}.part."):
        from ..data import list_images
        from ..predictions import check_table, predict_table

        check_table(out)
        defense = load_model(model, device)
        found = list_images(images, channels=defense.channels)
        settings: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "size": size}
        done = predict_table(defense, found, out, **settings, progress=not (quiet or as_json))
    if as_json:
        say(json.dumps({"path": str(out), "rows": done.rows, "found": done.found, "failed": list(done.failed)}))
    else:
        before = f", {done.found} of them from before" if done.found else ""
        say(f"predictions {out}   ({done.rows} rows{before})")
    if done.failed:
        shown = ", ".join(map(clean, done.failed[:_SHOWN])) + (", ..." if len(done.failed) > _SHOWN else "")
        say(f"error: {len(done.failed)} of {done.rows} images could not be read: {shown}. {out} says why.", err=True)
        raise typer.Exit(1)


def _print_predictions(
    model: Path,
    images: list[Path],
    batch_size: int,
    size: int | None,
    workers: int,
    device: str | None,
    as_json: bool,
) -> None:
    from ..data import list_images
    from ..predictions import predict_images

    defense = load_model(model, device)
    found = list_images(images, channels=defense.channels)
    batches = predict_images(defense, found, batch_size=batch_size, workers=workers, size=size)
    rows = [row for batch in batches for row in batch]
    unread = next((row.error for row in rows if row.error is not None), None)
    if unread is not None:
        raise InputError(unread)
    if as_json:
        shown = ("image", "label", "probability", "attacked", "score")
        predictions = [{name: getattr(row, name) for name in shown} for row in rows]
        say(json.dumps({"threshold": defense.threshold, "predictions": predictions}))
        return
    names = [clean(row.image) for row in rows]
    width = max(map(len, names))
    for name, row in zip(names, rows, strict=True):
        verdict = "looks attacked" if row.attacked else "ok" if row.attacked is not None else "not calibrated"
        scored = "" if row.score is None else f" (score {row.score:+.3f})"
        said = f"{clean(row.label or ''):<12} {row.probability:>7.1%}"
        say(f"{name:<{width}}  {said}  {verdict}{scored}")


def _hardening(record: Any) -> str:
    """Return the budget of the hardening; another program may have written anything into the record."""
    from ..config import is_number

    recipe = record.get("config") if isinstance(record, dict) else None
    if not (isinstance(recipe, dict) and is_number(recipe.get("eps"))):
        return "in a way that zepad does not know"
    steps, images = recipe.get("steps"), record.get("images")
    attack = "" if steps is None else f"{steps} steps, "
    return clean(f"eps {recipe['eps'] * 255:.3g}/255, {attack}{images} images")

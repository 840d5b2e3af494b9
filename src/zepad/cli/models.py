"""Commands that show, describe and use a model: `zepad demo`, `zepad info`, `zepad predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..escaping import clean
from .root import JSON_OPTION, app, say


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the numbers and the saved model.")] = Path(
        "zepad-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of heads, attacks and training.")] = 0,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Attack two public encoders, harden them, and compare: real images, no network, a minute or two on two cores."""
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
    path: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
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
    path: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Classify image files and say which look attacked."""
    from ..data import read_image
    from ..model import ZePAD

    defense = ZePAD.from_pretrained(path)
    rows: list[dict[str, Any]] = []
    for image in images:
        report = defense.inspect(read_image(image, channels=defense.channels)[None])
        rows.append(
            {
                "image": str(image),
                "label": report.name(int(report.labels[0])),
                "probability": round(float(report.probabilities[0]), 6),
                "attacked": None if report.flagged is None else bool(report.flagged[0]),
                "score": None if report.scores is None else round(float(report.scores[0]), 6),
            }
        )
    if as_json:
        say(json.dumps({"threshold": defense.threshold, "predictions": rows}))
        return
    names = [clean(row["image"]) for row in rows]
    width = max(map(len, names))
    for name, row in zip(names, rows, strict=True):
        verdict = "looks attacked" if row["attacked"] else "ok" if row["attacked"] is not None else "not calibrated"
        scored = "" if row["score"] is None else f" (score {row['score']:+.3f})"
        said = f"{clean(row['label']):<12} {row['probability']:>7.1%}"
        say(f"{name:<{width}}  {said}  {verdict}{scored}")


def _hardening(record: Any) -> str:
    """Return the budget of the hardening; another program may have written anything into the record."""
    from ..config import is_number

    recipe = record.get("config") if isinstance(record, dict) else None
    if not (isinstance(recipe, dict) and is_number(recipe.get("eps"))):
        return "in a way that zepad does not know"
    steps, images = recipe.get("steps"), record.get("images")
    return clean(f"eps {recipe['eps'] * 255:.3g}/255, {steps} steps, {images} images")

"""Commands that make a model, step by step: `zepad harden`, `zepad fit`, `zepad calibrate`, `zepad export`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from ..errors import ConfigError, InputError
from .ending import interruptible
from .root import JSON_OPTION, MODEL, QUIET, SEED, app, say
from .settings import CONFIG, EPOCHS, EPS, SAVE_CONFIG, merge, parse_eps, read_settings, write_settings
from .sources import BATCH, BATCH_SIZE, DATA, DEVICE, DOWNLOAD, ROOT, SIZE, WORKERS, Source, find_device, load_model

if TYPE_CHECKING:
    from ..model import ZePAD

_Unseen = Literal["validation", "test", "all"]

SPEC = "Encoder, such as timm:resnet18, solo:FILE or zepad:digits-simclr."
VAL_DATA = typer.Option(
    metavar="SOURCE",
    help="Images for choosing the best epoch, all that a folder or .npz file has. By default a tenth of the training "
    "images is kept for that.",
)
CHECKPOINTS = typer.Option(metavar="FOLDER", help="Keep the newest epochs here, so that an interrupted run can go on.")
RESUME = typer.Option("--resume", help="Go on from --checkpoint-dir, if there is something.")
BANK = typer.Option(metavar="FOLDER", help="Keep adversarial examples that are crafted beforehand, for another run.")
TRAIN_LIMIT = typer.Option(min=1, metavar="NUMBER", help="Train on this many images at most.")
OUT = typer.Option(metavar="FOLDER", help="Folder of the model to write.")
OTHER_OUT = typer.Option(metavar="FOLDER", help="Folder of the model to write; by default MODEL is written anew.")


@app.command()
def harden(
    victim: Annotated[str, typer.Argument(metavar="VICTIM", help=f"Public encoder to protect. {SPEC}")],
    auxiliary: Annotated[str, typer.Argument(metavar="AUXILIARY", help="A second one, pre-trained in another way.")],
    data: Annotated[str, DATA],
    out: Annotated[Path, OUT],
    benign: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Encoder of the benign branch; by default a copy of AUXILIARY.")
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="private, published, cautious or paper: the attacker you fear.")
    ] = "private",
    fusion: Annotated[
        str | None, typer.Option(metavar="NAME", help="Fusion rule, such as bounded; by default that of the preset.")
    ] = None,
    detector: Annotated[str, typer.Option(metavar="NAME", help="Detector, such as gap or features.")] = "gap",
    eps: Annotated[str | None, EPS] = None,
    epochs: Annotated[int | None, EPOCHS] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="Number of steps of the training attack, in place of the preset's."),
    ] = None,
    seed: Annotated[int | None, SEED] = None,
    config: Annotated[Path | None, CONFIG] = None,
    save_config: Annotated[Path | None, SAVE_CONFIG] = None,
    val_data: Annotated[str | None, VAL_DATA] = None,
    checkpoint_dir: Annotated[Path | None, CHECKPOINTS] = None,
    resume: Annotated[bool, RESUME] = False,
    bank_dir: Annotated[Path | None, BANK] = None,
    limit: Annotated[int | None, TRAIN_LIMIT] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Harden two public encoders and write a model, which zepad fit completes.

    It trains on nine tenths of the train split of the data. The last tenth is for zepad calibrate, and no command
    trains on it; the test split is for zepad evaluate. In --config this is the section harden.
    """
    with interruptible(*_kept(out, checkpoint_dir)):
        from ..model import ZePAD
        from ..presets import find_preset

        _require_folder_to_resume(checkpoint_dir, resume)
        _require_writable(out)
        settings = read_settings(config)
        given = {"eps": None if eps is None else parse_eps(eps), "epochs": epochs, "steps": steps, "seed": seed}
        chosen = merge(find_preset(preset).harden, settings.get("harden", {}), **given)
        find_device(device)
        source = Source(
            size=size, root=root, download=download, seed=chosen.seed, workers=workers, batch_size=batch_size
        )
        train = source.part(data, "train", limit=limit, shuffle=True)
        validation = None if val_data is None else source.split(val_data, "all")
        named: dict[str, Any] = {"benign": benign, "preset": preset, "fusion": fusion, "detector": detector}
        defense = ZePAD.from_encoders(victim, auxiliary, **named)
        write_settings(save_config, {"harden": chosen})
        defense.harden(
            train,
            chosen,
            val_loader=validation,
            checkpoint_dir=checkpoint_dir,
            bank_dir=bank_dir,
            resume=resume,
            progress=not (quiet or as_json),
        )
        defense.save_pretrained(out)
    _tell(defense, out, as_json, f"zepad fit {out} {_images(data, size)}")


@app.command()
def fit(
    model: Annotated[Path, MODEL],
    data: Annotated[str, DATA],
    out: Annotated[Path | None, OTHER_OUT] = None,
    heads_only: Annotated[
        bool, typer.Option("--heads-only", help="Fit new heads for the task of the data, and train no encoder.")
    ] = False,
    keep_heads: Annotated[
        bool, typer.Option("--keep-heads", help="Keep the heads that zepad harden trained on attacked images.")
    ] = False,
    epochs: Annotated[int | None, EPOCHS] = None,
    seed: Annotated[int | None, SEED] = None,
    config: Annotated[Path | None, CONFIG] = None,
    save_config: Annotated[Path | None, SAVE_CONFIG] = None,
    val_data: Annotated[str | None, VAL_DATA] = None,
    checkpoint_dir: Annotated[Path | None, CHECKPOINTS] = None,
    resume: Annotated[bool, RESUME] = False,
    bank_dir: Annotated[Path | None, BANK] = None,
    limit: Annotated[int | None, TRAIN_LIMIT] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Train the benign encoder of a hardened model and fit its heads, so that it classifies.

    It trains on nine tenths of the train split of the data, as zepad harden does. In --config these are the sections
    benign and heads.
    """
    with interruptible(*_kept(out or model, checkpoint_dir)):
        if heads_only and (keep_heads or val_data or checkpoint_dir or bank_dir):
            raise ConfigError("--heads-only trains heads alone: it takes no --keep-heads, --val-data or folder.")
        _require_folder_to_resume(checkpoint_dir, resume)
        _require_writable(out or model)
        settings = read_settings(config)
        defense = load_model(model, device)
        from ..config import HeadConfig

        heads = merge(HeadConfig(), settings.get("heads", {}), epochs=epochs if heads_only else None, seed=seed)
        chosen = merge(defense.preset.benign, settings.get("benign", {}), epochs=epochs, seed=seed)
        source = Source(
            size=size, root=root, download=download, seed=chosen.seed, workers=workers, batch_size=batch_size
        )
        train = source.part(data, "train", limit=limit, shuffle=True)
        validation = None if val_data is None else source.split(val_data, "all")
        write_settings(save_config, {"heads": heads} if heads_only else {"benign": chosen, "heads": heads})
        shown = not (quiet or as_json)
        if heads_only:
            defense.fit_heads(train, heads, progress=shown)
        else:
            defense.fit_benign(
                train,
                chosen,
                head_config=None if keep_heads else heads,
                val_loader=validation,
                checkpoint_dir=checkpoint_dir,
                bank_dir=bank_dir,
                resume=resume,
                progress=shown,
            )
        defense.save_pretrained(out or model)
    _tell(defense, out or model, as_json, f"zepad calibrate {out or model} {_images(data, size)}")


@app.command()
def calibrate(
    model: Annotated[Path, MODEL],
    data: Annotated[str, DATA],
    split: Annotated[
        str,
        typer.Option(
            metavar="PART",
            help="validation: the tenth of the train split that zepad harden and fit leave out. test: then do not "
            "evaluate on it. all: every image of a folder or .npz file that has no split.",
        ),
    ] = "validation",
    out: Annotated[Path | None, OTHER_OUT] = None,
    fpr: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the benign images that may be flagged, in (0, 1).")
    ] = 0.05,
    benign_floor: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Benign accuracy in [0, 1] to keep; by default the undefended victim's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="NUMBER", help="Use this many images at most.")] = None,
    batch_size: Annotated[int, BATCH_SIZE] = BATCH,
    size: Annotated[int | None, SIZE] = None,
    root: Annotated[Path | None, ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    workers: Annotated[int, WORKERS] = 0,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Choose the settings of the fusion and set the threshold of the detector, on images that no training has seen.

    An encoder behaves differently on the images that it was trained on, so that they would make the threshold wrong.
    If the model was trained elsewhere than by zepad harden and fit, name a folder of other images and --split all.
    """
    with interruptible(f"{model} is as it was: nothing is written before the end."):
        if split not in get_args(_Unseen):
            trained = " The train split was trained on, which would make the threshold wrong." * (split == "train")
            raise ConfigError(f"--split must be validation, test or all; got {split!r}.{trained}")
        part: Any = split
        _require_writable(out or model)
        defense = load_model(model, device)
        source = Source(size=size, root=root, download=download, workers=workers, batch_size=batch_size)
        unseen = source.part(data, part, limit=limit)
        # What a detector learns of benign images it may learn from those that were trained on.
        seen = None if split == "all" else source.part(data, "train", limit=limit)
        defense.calibrate(unseen, fpr=fpr, benign_floor=benign_floor, fit_loader=seen)
        defense.save_pretrained(out or model)
    _tell(defense, out or model, as_json, f"zepad evaluate {out or model} {_images(data, size)} --out report")


@app.command()
def export(
    model: Annotated[Path, MODEL],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .onnx, or .pt2 for torch.export.")],
    size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Height and width of the images it will be given.")
    ] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Export a fitted model as one graph that runs without zepad."""
    with interruptible(f"{model} is as it was, and {file} is not written."):
        from ..model import ZePAD

        defense = ZePAD.from_pretrained(model)
        defense.export(file, image_size=None if size is None else (size, size))
    if as_json:
        say(json.dumps({"path": str(file), "bytes": file.stat().st_size}))
        return
    say(f"exported    {file}   ({file.stat().st_size / 1e6:.1f} MB)")


def _require_folder_to_resume(checkpoint_dir: Path | None, resume: bool) -> None:
    if resume and checkpoint_dir is None:
        raise ConfigError("--resume needs the --checkpoint-dir to go on from.")


def _require_writable(out: Path) -> None:
    """Refuse a folder that could not be written after hours of training.

    Raises:
        InputError: If it is no folder, or may not be written to.
    """
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{out} cannot be written: {nearest} is no writable folder. Choose another --out.")


def _kept(out: Path, checkpoint_dir: Path | None) -> tuple[str, ...]:
    """Return what is kept of an interrupted training, and the options that it goes on with."""
    if checkpoint_dir is None:
        folder = out.with_name(f"{out.name}-checkpoints")
        return (
            f"Nothing is kept, and {out} is as it was. With --checkpoint-dir an interrupted run can go on.",
            "--checkpoint-dir",
            str(folder),
        )
    return f"Kept: every epoch that was finished, in {checkpoint_dir}. {out} is as it was.", "--resume"


def _images(data: str, size: int | None) -> str:
    return f"--data {data}" + (f" --size {size}" if size else "")


def _tell(defense: ZePAD, path: Path, as_json: bool, following: str) -> None:
    """Say what a model is now, and which command comes next."""
    if as_json:
        said = {"path": str(path), "stage": defense.stage, "classes": defense.num_classes}
        say(json.dumps({**said, "threshold": defense.threshold}))
        return
    threshold = "" if defense.threshold is None else f", threshold {defense.threshold:.4g}"
    say(f"model       {path}   ({defense.stage}, {defense.num_classes} classes{threshold})")
    say(f"Next: {following}")

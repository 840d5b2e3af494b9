"""The second stage: the benign encoder is trained on clean images, or kept as it is where that serves better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import BenignConfig, HeadConfig
from ..encoders import Encoder
from ..inputs import check_reiterable
from ..modules import Branch
from ..objectives.benign import benign_recipe
from ..seeding import derive_seed, seeded
from ..types import ROLES, Loader
from .accelerator import make_accelerator, prepare_loader
from .checkpoints import checkpoint_folder
from .copies import copy_encoder
from .heads import fit_heads
from .loaders import count_classes, num_images, split
from .loop import starting_branch, train
from .run import Run, resolved_settings
from .validation import validate


def train_benign(
    encoder: nn.Module,
    loader: Loader,
    config: BenignConfig = BenignConfig(),
    *,
    num_classes: int | None = None,
    val_loader: Loader | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Branch, dict[str, Any]]:
    """Train the encoder of the benign branch and its head on clean images (benign memory preservation, BMP).

    Args:
        encoder: An `Encoder`, or any module from images to features; it is copied, never modified.
        loader: Loader that yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1].
        config: Rates and length, and whether the encoder is fine-tuned, frozen, or the better of the two is kept.
        num_classes: Number of classes; None takes it from the loader.
        val_loader: Loader for choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Folder where the newest epochs are kept, in the folder `benign`.
        resume: Whether to go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Whether to show a progress bar.

    Returns:
        The branch in evaluation mode on the training device, its encoder frozen, and the record for the provenance:
        `"config"`, number of `"images"` and `"history"`, one record per epoch.
        With `freeze_encoder=None` the history is that of the fine-tuned form, and `"choice"` holds the form that was
        kept, the accuracies of both on the held-out images and the number of these.

    Raises:
        InputError: If the encoder, a batch or the folder does not fit.
        ConfigError: If `resume` lacks its folder.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder holds another run.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    folder = checkpoint_folder(checkpoint_dir, resume=resume)
    check_reiterable(loader)
    copied = copy_encoder("benign", encoder)
    run = Run.on(
        copied,
        name="fit benign",
        index=ROLES.index("benign"),
        recipe=benign_recipe(freeze_encoder=bool(config.freeze_encoder)),
        config=config,
        num_classes=num_classes or count_classes(loader),
        checkpoint_dir=folder / "benign" if folder else None,
        resume=resume,
        progress=progress,
    )
    branch = starting_branch(copied, run)
    train_loader, chosen_by = split(loader, val_loader, config.val_fraction, config.seed)
    history = train(branch, run, train_loader, chosen_by)
    settings = {**resolved_settings(config, run.recipe), "lr": run.lr}
    record = {"config": settings, "images": num_images(loader), "history": history}
    if config.freeze_encoder is None:
        frozen = None if chosen_by is None else _fit_frozen(copy_encoder("benign", encoder), run, train_loader)
        branch, record["choice"] = _choose(branch, frozen, run, history, chosen_by)
    return branch, record


def _fit_frozen(encoder: Encoder, run: Run, loader: Loader) -> Branch:
    """Return an encoder as it is, with a head fitted to its features, which are computed once."""
    assert run.num_classes is not None
    heads = fit_heads(
        {"benign": encoder},
        loader,
        HeadConfig(seed=run.config.seed),
        channels=run.channels,
        num_classes=run.num_classes,
        progress=run.progress,
    )
    encoder.requires_grad_(False)
    return Branch(encoder, heads["benign"]).eval()


def _choose(
    tuned: Branch, frozen: Branch | None, run: Run, history: list[dict[str, float]], loader: Loader | None
) -> tuple[Branch, dict[str, Any]]:
    """Return the form with the higher accuracy on the held-out images, and what is recorded of the choice."""
    if frozen is None or loader is None:
        return tuned, {"freeze_encoder": False, "held_out_images": 0}
    accelerator = make_accelerator(run.config.seed)
    with seeded(derive_seed(run.config.seed)):  # iterating draws from the caller's generator
        rates = validate(frozen, run, prepare_loader(accelerator, loader), accelerator, seed=0)
    # The best epoch was chosen on these very images, so its accuracy is too high to compare with; the last was not.
    tuned_rate, frozen_rate = history[-1]["val_benign_accuracy"], rates["val_benign_accuracy"]
    freeze = frozen_rate >= tuned_rate
    record = {
        "freeze_encoder": freeze,
        "held_out_images": num_images(loader),
        "accuracies": {"fine_tuned": tuned_rate, "frozen": frozen_rate},
    }
    return (frozen if freeze else tuned), record

"""The second stage: the benign encoder is trained on clean images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import BenignConfig
from ..inputs import check_reiterable
from ..modules import Branch
from ..objectives.benign import benign_recipe
from ..types import ROLES, Loader
from .checkpoints import checkpoint_folder
from .copies import copy_encoder
from .loaders import count_classes, num_images, split
from .loop import starting_branch, train
from .run import Run, resolved_settings


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
        config: Rates and length; `BenignConfig(freeze_encoder=True)` trains the head alone.
        num_classes: Number of classes; None takes it from the loader.
        val_loader: Loader for choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Folder where the newest epochs are kept, in the folder `benign`.
        resume: Whether to go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Whether to show a progress bar.

    Returns:
        The branch in evaluation mode on the training device, its encoder frozen, and the record for the provenance:
        `"config"`, number of `"images"` and `"history"`, one record per epoch.

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
        recipe=benign_recipe(freeze_encoder=config.freeze_encoder),
        config=config,
        num_classes=num_classes or count_classes(loader),
        checkpoint_dir=folder / "benign" if folder else None,
        resume=resume,
        progress=progress,
    )
    branch = starting_branch(copied, run)
    history = train(branch, run, *split(loader, val_loader, config.val_fraction, config.seed))
    return branch, {"config": resolved_settings(config, run.recipe), "images": num_images(loader), "history": history}

"""The second stage of a recipe: chosen layers of a hardened branch are trained on clean images."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate.utils import broadcast_object_list

from ..modes import autocast
from ..modules import Branch
from ..objectives import Adaptation, Batch, Recipe
from ..objectives.benign import benign_objective
from ..seeding import derive_seed, seeded
from ..types import Loader
from .accelerator import training_device
from .loaders import random_part
from .loop import train
from .run import Run

_SECOND_STAGE = 1000  # added to the index of a run, so that its second stage draws other seeds


def adapt(
    branch: Branch, adaptation: Adaptation, run: Run, loader: Loader, val_loader: Loader | None
) -> tuple[list[dict[str, float]], list[str]]:
    """Train the layers that an adaptation chooses, in place, and leave all others bit for bit.

    Args:
        branch: The hardened branch, which comes back in evaluation mode.
        adaptation: The second stage of the recipe.
        run: The first stage.
        loader: Loader that the first stage trained on.
        val_loader: Loader for choosing the best epoch; None keeps the last.

    Returns:
        One record per epoch, and the names of the layers.

    Raises:
        InputError: If a batch does not fit.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder of the run holds another second stage.
    """
    layers = _choose_layers(branch, adaptation, run, loader)
    return train(branch, _second_stage(adaptation, layers, run), loader, val_loader), layers


def _choose_layers(branch: Branch, adaptation: Adaptation, run: Run, loader: Loader) -> list[str]:
    device = training_device()
    seed = derive_seed(run.config.seed, run.index + _SECOND_STAGE)
    generator = torch.Generator(device).manual_seed(seed)
    attack, left = run.attack, adaptation.images
    batches: list[Batch] = []
    # Every process reads the same images, so the loader is not shared out; a run that resumes reads them again.
    part = random_part(loader, adaptation.images, seed)
    with seeded(seed):
        for images, labels in run.batches(part, device):
            images, labels = images[:left], labels[:left]
            with autocast(device, run.config.precision):
                attacked = images if attack is None else attack(branch, images, labels, generator=generator)
            batches.append(Batch(images, attacked, labels))
            left -= len(labels)
            if left <= 0:
                break
        layers = list(adaptation.choose(branch, batches))
    broadcast_object_list(layers)  # rounding may differ between processes, the choice must not
    return layers


def _second_stage(adaptation: Adaptation, layers: list[str], run: Run) -> Run:
    recipe = Recipe(
        name=f"{run.recipe.name}, adaptation",
        objective=benign_objective,
        inner=None,
        trained=tuple(layers),
        min_updates=100,
        rates=run.rates,
    )
    epochs = adaptation.epochs or run.config.epochs
    return replace(
        run,
        name=f"{run.name}, adaptation",
        stage="adaptation",
        index=run.index + _SECOND_STAGE,
        lr=adaptation.lr,
        recipe=recipe,
        static=None,
        config=replace(run.config, lr=adaptation.lr, head_lr=adaptation.lr, epochs=epochs),
        checkpoint_dir=run.checkpoint_dir / "adaptation" if run.checkpoint_dir else None,
    )

"""The second stage: the benign encoder is trained, or kept as it is where that serves better.

A recipe that also trains on static adversarial examples makes the branch resist what others can craft beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import BenignConfig, HeadConfig
from ..encoders import Encoder
from ..errors import ConfigError
from ..inputs import check_reiterable
from ..modules import Branch
from ..objectives import Recipe
from ..objectives.benign import benign_recipe
from ..seeding import derive_seed, seeded
from ..types import ROLES, Loader
from .accelerator import make_accelerator, prepare_loader
from .bank import static_daes
from .callbacks import Callback
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
    objective: Recipe | None = None,
    known: Mapping[str, nn.Module] | None = None,
    eps: float | None = None,
    num_classes: int | None = None,
    val_loader: Loader | None = None,
    checkpoint_dir: str | Path | None = None,
    bank_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> tuple[Branch, dict[str, Any]]:
    """Train the encoder of the benign branch and its head on clean images (benign memory preservation, BMP).

    Args:
        encoder: An `Encoder`, or any module from images to features; it is copied, never modified.
        loader: Loader that yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1].
        config: Rates and length, and whether the encoder is fine-tuned, frozen, or the better of the two is kept.
        objective: A recipe such as `static_adversarial_training()`, whose branch also resists adversarial examples
            that were crafted before; None trains on clean images alone. With `freeze_encoder=None` it is used where
            fine-tuning on clean images serves better than the encoder as it is, and kept unless it serves worse.
        known: Encoders by name that such adversarial examples are crafted on, which are not modified; None takes the
            encoder itself, as it is before training, by the name `"benign"`.
        eps: Radius of these adversarial examples where the recipe states none, in [0, 1] pixel units.
        num_classes: Number of classes; None takes it from the loader.
        val_loader: Loader for choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Folder where the newest epochs are kept, in the folder `benign`.
        bank_dir: Folder where adversarial examples are kept and found again, for a recipe that trains on them; None
            keeps them for this call alone.
        resume: Whether to go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Whether to show a progress bar.
        callbacks: Objects that are told of every stage, update and epoch, and may end a stage early.

    Returns:
        The branch in evaluation mode on the training device, its encoder frozen, and the record for the provenance:
        `"config"`, name of the `"method"`, number of `"images"` and `"history"`, one record per epoch.
        With `freeze_encoder=None` the history of a frozen form is that of the fine-tuned one that it is better than,
        and `"choice"` holds the form that was kept, the accuracies of all forms on the held-out images and the number
        of these.

    Raises:
        InputError: If the encoder, a batch or the folder does not fit.
        ConfigError: If `resume` lacks its folder, or the recipe does not suit this stage.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder holds another run.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), benign memory preservation.
    """
    if objective is not None:
        _check_recipe(objective, config)
    folder = checkpoint_folder(checkpoint_dir, resume=resume)
    check_reiterable(loader)
    copied = copy_encoder("benign", encoder)
    sources = {"benign": copied} if known is None else known
    classes = num_classes or count_classes(loader)
    train_loader, chosen_by = split(loader, val_loader, config.val_fraction, config.seed)

    def fit(config: BenignConfig, objective: Recipe | None, name: str) -> tuple[Branch, dict[str, Any], Run]:
        recipe = benign_recipe(freeze_encoder=bool(config.freeze_encoder)) if objective is None else objective
        with static_daes(
            recipe.static, sources, train_loader, config, eps=eps, folder=bank_dir, progress=progress
        ) as static:
            run = Run.on(
                copied,
                name="fit benign",
                stage="benign",
                branch="benign",
                index=ROLES.index("benign"),
                recipe=recipe,
                config=config,
                num_classes=classes,
                static=static,
                checkpoint_dir=folder / name if folder else None,
                resume=resume,
                progress=progress,
                callbacks=callbacks,
            )
            branch = starting_branch(copy_encoder("benign", encoder), run)
            history = train(branch, run, train_loader, chosen_by)
        settings = {**resolved_settings(config, run.recipe), "lr": run.lr}
        record = {"config": settings, "method": recipe.name, "images": num_images(loader), "history": history}
        return branch, record, run

    if config.freeze_encoder is not None:
        return fit(config, objective, "benign")[:2]
    # Fine-tuning on clean images is cheap, and tells whether the encoder is worth training at all.
    tuned, record, run = fit(config, None, "benign")
    frozen = None if chosen_by is None else _fit_frozen(copy_encoder("benign", encoder), run, train_loader)
    choice = _choose(frozen, run, record["history"], chosen_by)
    if objective is not None and not choice["freeze_encoder"]:
        resistant, own, run = fit(replace(config, freeze_encoder=False), objective, "resistant")
        if chosen_by is not None:
            rates = choice["accuracies"]
            rates["resistant"] = _accuracy(resistant, run, chosen_by)
            choice["freeze_encoder"] = rates["resistant"] < rates["frozen"]
        if not choice["freeze_encoder"]:
            tuned, record = resistant, own
    return (frozen if frozen is not None and choice["freeze_encoder"] else tuned), {**record, "choice": choice}


def was_frozen(record: Mapping[str, Any]) -> bool:
    """Return whether a recorded benign branch kept its encoder as it was public."""
    return bool(record.get("choice", record["config"])["freeze_encoder"])


def _check_recipe(recipe: Recipe, config: BenignConfig) -> None:
    """Refuse a recipe that the benign stage cannot run.

    Raises:
        ConfigError: If it trains no head, its attack states no budget, or the encoder is to be frozen.
    """
    if config.freeze_encoder:
        raise ConfigError(
            "freeze_encoder is True, and an objective of your own trains the encoder. Pass "
            "BenignConfig(freeze_encoder=False), or no objective."
        )
    if not recipe.trains_head:
        raise ConfigError(
            f"{recipe.name} trains no head, which the benign branch needs. Take static_adversarial_training(), or "
            "harden the encoder by zepad.training.harden_branch and pass it as from_encoders(..., benign=encoder)."
        )
    if recipe.inner is not None and recipe.inner.eps is None:
        raise ConfigError(
            f"{recipe.name} attacks the branch in training by the budget of HardenConfig, which this stage has not. "
            "Take static_adversarial_training(own_eps=..., own_steps=...)."
        )


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


def _choose(frozen: Branch | None, run: Run, history: list[dict[str, float]], loader: Loader | None) -> dict[str, Any]:
    """Return the record of the form with the higher accuracy on the held-out images."""
    if frozen is None or loader is None:
        return {"freeze_encoder": False, "held_out_images": 0}
    # The best epoch was chosen on these very images, so its accuracy is too high to compare with; the last was not.
    rates = {"fine_tuned": history[-1]["val_benign_accuracy"], "frozen": _accuracy(frozen, run, loader)}
    return {
        "freeze_encoder": rates["frozen"] >= rates["fine_tuned"],
        "held_out_images": num_images(loader),
        "accuracies": rates,
    }


def _accuracy(branch: Branch, run: Run, loader: Loader) -> float:
    """Return the benign accuracy of a branch on held-out images."""
    accelerator = make_accelerator(run.config.seed)
    with seeded(derive_seed(run.config.seed)):  # iterating draws from the caller's generator
        return validate(branch, run, prepare_loader(accelerator, loader), accelerator, seed=0)["val_benign_accuracy"]

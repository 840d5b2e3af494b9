"""How encoders are adversarially fine-tuned, by ZePAD's own method or another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..attacks import PGD
from ..config import HardenConfig, HeadConfig
from ..encoders import Encoder, probe, wrap_module
from ..errors import InputError
from ..inputs import check_reiterable
from ..modules import Branch
from ..objectives import Adaptation, Batch, HardeningMethod, Objective, benign_objective, zepad_method
from ..seeding import derive_seed, seeded
from ..types import ImageModel, Loader
from .checkpoints import checkpoint_folder
from .heads import fit_heads
from .loaders import count_classes, hold_out, is_labelled, random_part
from .loop import (
    Labeller,
    Recipe,
    Run,
    autocast,
    labelled_batches,
    train_branch,
    train_parts,
    training_device,
    unlabelled,
)

_SECOND_STAGE = 1000  # added to the index of a run, so that its second stage draws other seeds


def hardening_method(config: HardenConfig, objective: Objective | HardeningMethod | None) -> HardeningMethod:
    """Return the method that `objective` stands for: itself, a plain function outside cross-entropy, or ZePAD's own.

    Args:
        config: Holds the weight of ZePAD's structure loss.
        objective: As in `harden_branch`.
    """
    if objective is None:
        return zepad_method(structure_weight=config.structure_weight)
    if isinstance(objective, HardeningMethod):
        return objective
    return HardeningMethod(name=getattr(objective, "__qualname__", repr(objective)), objective=objective)


def harden_recipe(config: HardenConfig, objective: Objective | HardeningMethod | None = None) -> Recipe:
    """Return the recipe of adversarial fine-tuning: PGD inside, the objective outside.

    Args:
        config: Budget of the attack and weight of the structure loss.
        objective: What is minimised; ZePAD's own by default.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """
    method = hardening_method(config, objective)
    step_size = config.step_size or 2 * config.eps / config.steps
    return Recipe(
        objective=method.objective,
        name=method.name,
        attack=PGD(eps=config.eps, steps=config.steps, step_size=step_size),
        inner=method.inner,
        trained=("encoder", "head") if method.trains_head else ("encoder",),
        choose_epoch=method.trains_head,
        min_updates=900,
        min_epochs=10,
    )


def harden_branch(
    encoder: nn.Module,
    loader: Loader,
    config: HardenConfig = HardenConfig(),
    *,
    objective: Objective | HardeningMethod | None = None,
    num_classes: int | None = None,
    val_loader: Loader | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Branch, dict[str, Any]]:
    """Harden one encoder by any method, as `ZePAD.harden` hardens each of its two.

    Args:
        encoder: An `Encoder`, or any module from images to features; copied, never modified.
        loader: Yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]; images alone will do for FARE.
        config: Rates, length and budget of the inner attack, for every method alike.
        objective: A method such as `trades(beta=6)`, or a plain function from branch and batch to an `Outcome`, which
            is minimised outside an attack on cross-entropy. None is ZePAD's own.
        num_classes: Of the task; None takes it from the loader.
        val_loader: For choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Keeps the newest epochs there.
        resume: Go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Show bars.

    Returns:
        The branch in evaluation mode on the training device, its encoder frozen, and the history. The head is the one
        trained along with the encoder; for a method that trains none (FARE), one fitted afterwards on clean features,
        or the identity if there are no labels to fit it to. The history holds a list of records per epoch under
        `"hardening"`, and for a method with a second stage `"adaptation"` and the names of the `"adapted_layers"`.

    Raises:
        InputError: If the encoder, a batch or the folder does not fit.
        ConfigError: If `resume` lacks its folder.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder holds another run.
    """
    copied = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else wrap_module(encoder)
    check_state("encoder", copied)
    channels, features = probe(copied)
    folder = checkpoint_folder(checkpoint_dir, resume=resume)
    method = hardening_method(config, objective)
    classes, labeller = plan_labels(loader, method, num_classes=num_classes)
    run = Run(
        name="harden encoder",
        index=0,
        recipe=harden_recipe(config, objective),
        config=config,
        features=features,
        channels=channels,
        num_classes=classes,
        labeller=labeller,
        checkpoint_dir=folder,
        resume=resume,
        progress=progress,
    )
    return run_method(copied, method, run, loader, val_loader)


def plan_labels(
    loader: Loader,
    method: HardeningMethod,
    *,
    num_classes: int | None = None,
    classifier: Callable[[], ImageModel] | None = None,
) -> tuple[int | None, Labeller | None]:
    """Say where the labels of a hardening come from: the loader, a zero-shot classifier, or nowhere.

    Args:
        loader: Yields `(images, labels)`, or images alone.
        method: Which may need no labels.
        num_classes: Of the task, where known.
        classifier: Makes the zero-shot classifier of the public encoders, which labels images that have no label.

    Returns:
        The number of classes, None where no label is used; and what labels the images of a loader that does not.

    Raises:
        InputError: If the loader cannot be iterated twice, is empty, or has no labels where they must be counted.
    """
    check_reiterable(loader)
    needed = method.trains_head and classifier is None
    if needed or is_labelled(loader):  # a look at the first batch may be costly, and is taken only where it matters
        return num_classes or count_classes(loader), None
    if classifier is None or not method.trains_head:
        return (None if classifier is None else num_classes), unlabelled
    return num_classes, partial(_most_likely, classifier())


def _most_likely(classifier: ImageModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier(images).argmax(dim=1)


def run_method(
    encoder: Encoder, method: HardeningMethod, run: Run, loader: Loader, val_loader: Loader | None
) -> tuple[Branch, dict[str, Any]]:
    """Harden an encoder in place by every stage of a method.

    Args:
        encoder: Trained in place, so callers pass a copy.
        method: The method whose recipe `run` holds.
        run: The first stage.
        loader: As in `harden_branch`.
        val_loader: As in `harden_branch`.

    Returns:
        As `harden_branch`.

    Raises:
        InputError: As `harden_branch`.
        TrainingError: As `harden_branch`.
        CheckpointError: As `harden_branch`.
    """
    check_reiterable(loader)
    if val_loader is None:
        loader, val_loader = hold_out(loader, run.config.val_fraction, run.config.seed)
    branch, records = train_branch(encoder, run, loader, val_loader)
    history: dict[str, Any] = {"hardening": records}
    if not method.trains_head and run.head is None and run.num_classes is not None:
        branch = Branch(encoder, _fit_head(encoder, run, loader, run.num_classes)).eval()
    if method.adaptation is not None:
        layers = _choose_layers(branch, method.adaptation, run, loader)
        adapting = _second_stage(method, method.adaptation, layers, run)
        history["adaptation"] = train_parts(branch, adapting, loader, val_loader)
        history["adapted_layers"] = layers
    return branch, history


def check_state(name: str, encoder: nn.Module) -> None:
    """Refuse an encoder whose state holds anything but tensors: it could not be kept, synchronised or saved.

    Args:
        name: Of the encoder, for the message.
        encoder: The encoder.

    Raises:
        InputError: If so.
    """
    for key, value in encoder.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name}: the state of an encoder must be tensors alone; {key} is {type(value).__name__}. Remove "
                "get_extra_state from that module, or keep what it holds in buffers."
            )


def _fit_head(encoder: Encoder, run: Run, loader: Loader, num_classes: int) -> nn.Module:
    config = HeadConfig(seed=run.config.seed, precision=run.config.precision)
    heads = fit_heads(
        {"encoder": encoder},
        loader,
        config,
        channels=run.channels,
        num_classes=num_classes,
        progress=run.progress,
    )
    return heads["encoder"]


def _choose_layers(branch: Branch, adaptation: Adaptation, run: Run, loader: Loader) -> list[str]:
    device = training_device()
    seed = derive_seed(run.config.seed, run.index + _SECOND_STAGE)
    generator = torch.Generator(device).manual_seed(seed)
    batches: list[Batch] = []
    left = adaptation.images
    assert run.recipe.attack is not None
    # Every process reads the same images, so the loader is not shared out; a run that resumes reads them again.
    part = random_part(loader, adaptation.images, seed)
    with seeded(seed):
        batches_of_part = labelled_batches(
            part, device, channels=run.channels, num_classes=run.num_classes, labeller=run.labeller
        )
        for images, labels in batches_of_part:
            images, labels = images[:left], labels[:left]
            with autocast(device, run.config.precision):
                attacked = run.recipe.attack(branch, images, labels, generator=generator)
            batches.append(Batch(images, attacked, labels))
            left -= len(labels)
            if left <= 0:
                break
        layers = list(adaptation.choose(branch, batches))
    broadcast_object_list(layers)  # rounding may differ between processes, the choice must not
    return layers


def _second_stage(method: HardeningMethod, adaptation: Adaptation, layers: list[str], run: Run) -> Run:
    config = replace(run.config, lr=adaptation.lr, head_lr=adaptation.lr, epochs=adaptation.epochs or run.config.epochs)
    recipe = Recipe(
        objective=benign_objective,
        name=f"{method.name}, adaptation",
        attack=None,
        trained=tuple(layers),
        min_updates=100,
        min_epochs=10,
    )
    return replace(
        run,
        name=f"{run.name}, adaptation",
        index=run.index + _SECOND_STAGE,
        recipe=recipe,
        config=config,
        checkpoint_dir=run.checkpoint_dir / "adaptation" if run.checkpoint_dir else None,
    )

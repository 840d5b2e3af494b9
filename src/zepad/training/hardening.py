"""The first stage: encoders are adversarially fine-tuned, by ZePAD's own recipe or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..arguments import checked
from ..config import HardenConfig, HeadConfig
from ..encoders import Encoder
from ..modules import Branch
from ..objectives import Objective, Recipe, zepad_recipe
from ..progress import stage
from ..types import Loader
from ..zero_shot import ZeroShotHead
from .accelerator import make_accelerator
from .adaptation import adapt
from .bank import static_daes
from .callbacks import Callback
from .checkpoints import checkpoint_folder
from .copies import copy_encoder
from .heads import fit_heads
from .labels import plan_labels, zero_shot_labeller
from .loaders import class_names, num_images, split
from .loop import starting_branch, train
from .outcome import tell_outcome
from .run import Run, resolved_settings


class Hardened(NamedTuple):
    """The result of `harden`.

    Attributes:
        branches: Branches by name, in evaluation mode on the training device, their encoders frozen. The head is the
            one that was given, else the one trained along with the encoder; for a recipe that trains none (FARE) one
            fitted afterwards on clean features, or the identity if there are no labels to fit it to.
        num_classes: Number of classes; None where no label was used.
        class_names: Names of the classes where the data set has them, else None.
        record: Record for the provenance: `"config"`, the name of the `"method"`, number of `"images"`, and
            `"history"` with one list of records per encoder, the learning rate `"lr"` of each, and `"outcome"` with
            what each reached on held-out images beside the public encoder (None where nothing was held out or there are
            no labels).
    """

    branches: dict[str, Branch]
    num_classes: int | None
    class_names: tuple[str, ...] | None
    record: dict[str, Any]


def harden(
    encoders: Mapping[str, Encoder],
    loader: Loader,
    config: HardenConfig = HardenConfig(),
    *,
    objective: Objective | Recipe | None = None,
    zero_shot: Mapping[str, ZeroShotHead] | None = None,
    num_classes: int | None = None,
    val_loader: Loader | None = None,
    checkpoint_dir: str | Path | None = None,
    bank_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Hardened:
    """Adversarially fine-tune several encoders one after the other (multi-pattern adversarial enhancement, MPAE).

    Args:
        encoders: Encoders by name; they are copied, never modified.
        loader: Loader that yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]. Images alone will do for
            a recipe that trains no head, and with `zero_shot` heads, which then label them.
        config: Rates, length and budget of the inner attack.
        objective: A recipe such as `trades(beta=6)`, or a plain function from branch and batch to an
            `ObjectiveOutput`, which is minimised under an attack on cross-entropy. None is ZePAD's own recipe.
        zero_shot: Heads by name, one for each encoder (`zepad.zero_shot.check_heads`), that stand in for trained ones
            and stay as they are. Images without labels get those of the encoders' mean zero-shot logits.
        num_classes: Number of classes; None takes it from the loader.
        val_loader: Loader for choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Folder where the newest epochs are kept, in one folder per encoder.
        bank_dir: Folder where adversarial examples of the public encoders are kept and found again, for a recipe that
            trains on them; None keeps them for this call alone.
        resume: Whether to go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Whether to show progress bars.
        callbacks: Objects that are told of every stage, update and epoch, and may end a stage early.

    Returns:
        The branches and what is known of them.

    Raises:
        InputError: If an encoder, a batch or the folder does not fit.
        ConfigError: If `resume` lacks its folder.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder holds another run.

    Warns:
        HardeningWarning: If a branch is far less accurate on held-out images than its public encoder.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), multi-pattern adversarial enhancement.
    """
    folder, recipe, heads = checkpoint_folder(checkpoint_dir, resume=resume), as_recipe(objective, config), zero_shot
    classes, labeller = plan_labels(
        loader,
        recipe,
        num_classes=next(iter(heads.values())).classes if heads else num_classes,
        labeller=(lambda: zero_shot_labeller(encoders, heads)) if heads else None,
    )
    train_loader, chosen_by = split(loader, val_loader, config.val_fraction, config.seed)
    branches: dict[str, Branch] = {}
    history: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    rates: dict[str, float] = {}
    shown = progress and make_accelerator(config.seed).is_main_process
    with (
        static_daes(
            recipe.static, encoders, train_loader, config, eps=config.eps, folder=bank_dir, progress=progress
        ) as static,
        stage("encoders", total=len(encoders), shown=shown) as bar,
    ):
        for index, (name, encoder) in enumerate(encoders.items()):
            bar.rename(f"encoder {index + 1} of {len(encoders)}")
            copied = copy_encoder(name, encoder)
            run = Run.on(
                copied,
                name=f"harden {name}",
                stage="hardening",
                branch=name,
                index=index,
                recipe=recipe,
                config=config,
                num_classes=classes,
                head=heads[name] if heads else None,
                labeller=labeller,
                static=static,
                checkpoint_dir=folder / name if folder else None,
                resume=resume,
                progress=progress,
                callbacks=callbacks,
            )
            branches[name], stages = _run_stages(copied, run, train_loader, chosen_by)
            history[name] = stages.pop("hardening")
            history.update({f"{name} {part}": record for part, record in stages.items()})
            rates[name] = run.lr
            outcomes[name] = tell_outcome(encoder, branches[name], run, train_loader, chosen_by)
            bar.advance()
    names = None if classes is None or heads else class_names(loader)
    # Encoders of different architectures may have rates of their own, which one setting cannot state.
    settings = {**resolved_settings(config, recipe), "lr": config.lr if len(set(rates.values())) > 1 else run.lr}
    record = {"config": settings, "method": recipe.name, "images": num_images(loader), "history": history}
    record |= {"lr": rates, "outcome": outcomes}
    return Hardened(branches, classes, names, record)


@checked
def harden_branch(
    encoder: nn.Module,
    loader: Loader,
    config: HardenConfig = HardenConfig(),
    *,
    objective: Objective | Recipe | None = None,
    num_classes: int | None = None,
    val_loader: Loader | None = None,
    checkpoint_dir: str | Path | None = None,
    bank_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> tuple[Branch, dict[str, Any]]:
    """Harden one encoder by any recipe, as `ZePAD.harden` hardens each of its two.

    Args:
        encoder: An `Encoder`, or any module from images to features; it is copied, never modified.
        loader: Loader that yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]; images alone will do for
            a recipe that trains no head.
        config: Rates, length and budget of the inner attack, for every recipe alike.
        objective: A recipe such as `trades(beta=6)`, or a plain function from branch and batch to an
            `ObjectiveOutput`, which is minimised under an attack on cross-entropy. None is ZePAD's own recipe.
        num_classes: Number of classes; None takes it from the loader.
        val_loader: Loader for choosing the best epoch; None holds out a part of `loader` where it can be split.
        checkpoint_dir: Folder where the newest epochs are kept.
        bank_dir: Folder where adversarial examples of the public encoders are kept and found again, for a recipe that
            trains on them; None keeps them for this call alone.
        resume: Whether to go on from `checkpoint_dir`; the result is that of an undisturbed run.
        progress: Whether to show progress bars.
        callbacks: Objects that are told of every stage, update and epoch, and may end a stage early.

    Returns:
        The branch, as in `Hardened`, and the history: a list of records per epoch under `"hardening"`, and for a
        recipe with a second stage `"adaptation"` and the names of the `"adapted_layers"`.

    Raises:
        InputError: If the encoder, a batch or the folder does not fit.
        ConfigError: If `resume` lacks its folder.
        TrainingError: If the loss is not finite.
        CheckpointError: If the folder holds another run.
    """
    folder, recipe = checkpoint_folder(checkpoint_dir, resume=resume), as_recipe(objective, config)
    classes, labeller = plan_labels(loader, recipe, num_classes=num_classes)
    copied = copy_encoder("encoder", encoder)
    train_loader, chosen_by = split(loader, val_loader, config.val_fraction, config.seed)
    public = {"encoder": copied}
    with static_daes(
        recipe.static, public, train_loader, config, eps=config.eps, folder=bank_dir, progress=progress
    ) as static:
        run = Run.on(
            copied,
            name="harden encoder",
            stage="hardening",
            branch="encoder",
            index=0,
            recipe=recipe,
            config=config,
            num_classes=classes,
            labeller=labeller,
            static=static,
            checkpoint_dir=folder,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
        )
        return _run_stages(copied, run, train_loader, chosen_by)


def as_recipe(objective: Objective | Recipe | None, config: HardenConfig) -> Recipe:
    """Return the recipe that `objective` stands for.

    Args:
        objective: A recipe, a plain function that is minimised under an attack on cross-entropy, or None for ZePAD's
            own recipe.
        config: Settings that hold the weight of ZePAD's structure loss.
    """
    if objective is None:
        return zepad_recipe(structure_weight=config.structure_weight)
    if isinstance(objective, Recipe):
        return objective
    return Recipe(name=getattr(objective, "__qualname__", repr(objective)), objective=objective)


def _run_stages(encoder: Encoder, run: Run, loader: Loader, val_loader: Loader | None) -> tuple[Branch, dict[str, Any]]:
    """Harden an encoder in place by every stage of the run's recipe."""
    recipe, branch = run.recipe, starting_branch(encoder, run)
    history: dict[str, Any] = {"hardening": train(branch, run, loader, val_loader)}
    if not recipe.trains_head and run.head is None and run.num_classes is not None:
        branch = Branch(encoder, _fit_head(encoder, run, loader, run.num_classes)).eval()
    if recipe.adaptation is not None:
        history["adaptation"], history["adapted_layers"] = adapt(branch, recipe.adaptation, run, loader, val_loader)
    return branch, history


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

"""What attackers start from who have the public encoders, or repeat the training of a defense."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from ..arguments import checked
from ..config import HardenConfig, HeadConfig
from ..encoders import Encoder, EncoderLike, build_encoder, probe
from ..encoders.given import as_encoder
from ..errors import ConfigError, InputError
from ..evaluation.identity import digest
from ..evaluation.kept import digest_data
from ..model import ZePAD
from ..modules import Branch
from ..objectives import (
    Objective,
    Recipe,
    fare,
    gen_af,
    mart,
    pgd_at,
    restoration,
    static_adversarial_training,
    trades,
)
from ..presets import PRESETS
from ..training import fit_heads, harden
from ..training.hardening import as_recipe
from ..types import HARDENED_ROLES, REFERENCE, Loader, Role

_RECIPES = (fare, gen_af, mart, pgd_at, restoration, static_adversarial_training, trades)
_SHOWN = 16  # hexadecimal digits of a digest in the name of a folder


@checked
def public_encoder(defense: ZePAD, role: Role) -> Encoder:
    """Return an encoder that a defense was built on, as it was before any hardening.

    Args:
        defense: The defense; not modified.
        role: `"victim"`, which the defense may keep, or any other role that has a public encoder.

    Returns:
        A copy of the kept encoder, or one that its source builds again with its pre-trained weights, which may
        download them.

    Raises:
        ConfigError: If only its owner can say which encoder or which weights it had.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If the weights cannot be downloaded.
    """
    if role == "victim" and defense.reference is not None:
        return copy.deepcopy(defense.encoder(REFERENCE))
    return build_encoder(defense.encoder(role).spec, pretrained=True)


@checked
def train_replica(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    loader: Loader,
    harden_config: HardenConfig = HardenConfig(),
    *,
    objective: Objective | Recipe | None = None,
    seed: int = 1,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Encoder]:
    """Repeat the hardening as an attacker does who knows the public encoders and this library.

    The copies serve every model that was hardened alike, so that they are trained once for a table.

    Args:
        victim: The public encoder; not modified.
        auxiliary: The second public encoder; not modified.
        loader: Yields the attacker's `(images, labels)`, which should not be those of the defense; images alone will do
            for an objective without labels. Shuffle it.
        harden_config: Settings of the hardening to be repeated, of which the seed is not used.
        objective: What the hardening to be repeated minimised; None is ZePAD's own recipe.
        seed: The attacker's seed, another than that of the defense.
        folder: Folder that keeps what is trained, in a subfolder for each set of encoders, data, settings, objective
            and seed: copies that are found there are not trained again, and an interrupted training goes on.
        progress: Show progress bars.

    Returns:
        The hardened copies by role, `"victim"` and `"auxiliary"`, frozen and in evaluation mode.

    Raises:
        InputError: If an encoder, a batch or the folder does not fit.
        TrainingError: If the loss is not finite.
        CheckpointError: If what the folder holds is damaged.
    """
    encoders = {"victim": as_encoder("victim", victim), "auxiliary": as_encoder("auxiliary", auxiliary)}
    config = replace(harden_config, seed=seed)
    made_by = None if folder is None else digest([encoders, digest_data(loader), config, as_recipe(objective, config)])
    hardened = harden(
        encoders,
        loader,
        config,
        objective=objective,
        bank_dir=None if folder is None else Path(folder) / "bank",
        checkpoint_dir=None if folder is None else Path(folder) / str(made_by)[:_SHOWN],
        resume=folder is not None,
        progress=progress,
    )
    return {role: cast(Encoder, branch.encoder).requires_grad_(False) for role, branch in hardened.branches.items()}


@checked
def replica_of(
    defense: ZePAD,
    public: Mapping[str, EncoderLike],
    loader: Loader,
    *,
    objective: Objective | Recipe | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Encoder]:
    """Repeat the hardening that a defense records, by `train_replica`.

    Args:
        defense: The defense, hardened with whatever settings.
        public: The public encoders that it was built on, `"victim"` and `"auxiliary"`; not modified.
        loader: Yields the attacker's `(images, labels)`, which should not be those of the defense. Shuffle it.
        objective: What the hardening minimised; None finds it by the record, if it is a recipe of `zepad.objectives`
            with its default settings.
        seed: The attacker's seed; None takes one more than the defense's.
        folder: Folder that keeps what is trained, as in `train_replica`.
        progress: Show progress bars.

    Returns:
        The hardened copies by role, `"victim"` and `"auxiliary"`, frozen and in evaluation mode.

    Raises:
        ConfigError: If a public encoder is missing, or the record names another recipe than `objective`, or one that
            cannot be found.
        InputError: If an encoder, a batch or the folder does not fit.
        TrainingError: If the loss is not finite.
    """
    missing = [role for role in HARDENED_ROLES if role not in public]
    if missing:
        raise ConfigError(f"a replica is hardened from both public encoders; {' and '.join(missing)} is not known.")
    record = defense.provenance.get("harden", {})
    config = HardenConfig.from_dict(record.get("config", {}))
    victim, auxiliary = (public[role] for role in HARDENED_ROLES)
    return train_replica(
        victim,
        auxiliary,
        loader,
        config,
        objective=_recorded_recipe(record.get("method"), config, objective),
        seed=config.seed + 1 if seed is None else seed,
        folder=folder,
        progress=progress,
    )


def _recorded_recipe(method: str | None, config: HardenConfig, objective: Objective | Recipe | None) -> Recipe:
    """Return the recipe of a recorded name: the one given, or else that of a preset or one with default settings."""
    known = [as_recipe(None, config), *(recipe() for recipe in _RECIPES)]
    known += [preset.objective(config) for preset in PRESETS.values()]
    for recipe in known if objective is None else [as_recipe(objective, config)]:
        if recipe.name == method:
            return recipe
    raise ConfigError(
        f"the defense was hardened by {method}, which is "
        + (f"not {as_recipe(objective, config).name}." if objective is not None else "no recipe of default settings.")
        + " Pass that recipe to zepad.protocols.replica_of: objective=..."
    )


@checked
def replica_branches(
    copies: Mapping[str, Encoder],
    loader: Loader,
    config: HeadConfig = HeadConfig(),
    *,
    num_classes: int,
    progress: bool = True,
) -> dict[str, Branch]:
    """Fit heads to hardened copies, as an attacker does who has labelled images of the task.

    Args:
        copies: The hardened copies by role, such as `train_replica` returns.
        loader: Yields the attacker's `(images, labels)` of the task.
        config: Settings of fitting the heads.
        num_classes: Number of classes of the task.
        progress: Show a progress bar.

    Returns:
        The copies with their heads by role, images to logits `(N, K)`, in evaluation mode.

    Raises:
        InputError: If a batch does not fit.
        TrainingError: If the loss is not finite.
    """
    if not copies:
        raise InputError("there are no copies to fit heads to. Pass at least one, such as train_replica returns.")
    channels = probe(next(iter(copies.values())))[0]
    heads = fit_heads(copies, loader, config, channels=channels, num_classes=num_classes, progress=progress)
    return {role: Branch(copies[role], head).eval() for role, head in heads.items()}

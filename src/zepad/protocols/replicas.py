"""What attackers start from who have the public encoders, or repeat the training of a defense."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..arguments import checked
from ..config import BenignConfig, HardenConfig, HeadConfig
from ..digests import shortened
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
    benign_recipe,
    fare,
    gen_af,
    mart,
    pgd_at,
    restoration,
    static_adversarial_training,
    trades,
)
from ..presets import PRESETS
from ..training import fit_heads, harden, train_benign
from ..training.benign import was_frozen
from ..training.hardening import as_recipe
from ..training.loaders import is_labelled
from ..types import HARDENED_ROLES, MEMORY, REFERENCE, ROLES, Loader, Role

_RECIPES = (fare, gen_af, mart, pgd_at, restoration, static_adversarial_training, trades)


@checked
def public_encoder(defense: ZePAD, role: Role) -> Encoder:
    """Return an encoder that a defense was built on, as it was before any hardening.

    Args:
        defense: The defense; not modified.
        role: `"victim"` or `"benign"`, whose public encoders the defense may keep, or any other role that has one.

    Returns:
        A copy of the kept encoder, or one that its source builds again with its pre-trained weights, which may
        download them.

    Raises:
        ConfigError: If only its owner can say which encoder or which weights it had.
        CheckpointError: If a file of weights is damaged or of another layout.
        HubError: If the weights cannot be downloaded.
    """
    kept: dict[Role, Role] = {"victim": REFERENCE, "benign": MEMORY}
    if role in kept and kept[role] in defense.encoders:
        return copy.deepcopy(defense.encoder(kept[role]))
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
    checkpoints = None
    if folder is not None:
        made_by = digest([encoders, digest_data(loader), config, as_recipe(objective, config)])
        checkpoints = Path(folder) / shortened(made_by)
    hardened = harden(
        encoders,
        loader,
        config,
        objective=objective,
        bank_dir=None if folder is None else Path(folder) / "bank",
        checkpoint_dir=checkpoints,
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
    benign_objective: Recipe | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Encoder]:
    """Repeat the training that a defense records.

    The hardening is repeated by `train_replica`. The benign branch is repeated too, against the copies, where the
    defense trained its encoder and the attacker's images have labels.

    Args:
        defense: The defense, trained with whatever settings.
        public: The public encoders that it was built on, `"victim"`, `"auxiliary"` and, if its benign branch began with
            a third one, `"benign"`; not modified.
        loader: Yields the attacker's `(images, labels)`, which should not be those of the defense, or images alone.
            Shuffle it.
        objective: What the hardening minimised; None finds it by the record, if it is a recipe of a preset or one of
            `zepad.objectives` with its default settings.
        benign_objective: What the training of the benign branch minimised; None finds it in the same way.
        seed: The attacker's seed; None takes one more than the defense's.
        folder: Folder that keeps what is trained, as in `train_replica`.
        progress: Show progress bars.

    Returns:
        The copies by role, `"victim"`, `"auxiliary"` and, if it was repeated, `"benign"`, frozen and in evaluation
        mode.

    Raises:
        ConfigError: If a public encoder is missing, or the record names another recipe than the one given, or one that
            cannot be found.
        InputError: If an encoder, a batch or the folder does not fit.
        TrainingError: If the loss is not finite.
    """
    third = has_third(defense)
    missing = [role for role in (ROLES if third else HARDENED_ROLES) if role not in public]
    if missing:
        raise ConfigError(f"a replica is trained from all public encoders; {' and '.join(missing)} is not known.")
    record = defense.provenance.get("harden", {})
    config = HardenConfig.from_dict(record.get("config", {}))
    known = [as_recipe(None, config), *(recipe() for recipe in _RECIPES)]
    known += [preset.objective(config) for preset in PRESETS.values()]
    given = None if objective is None else as_recipe(objective, config)
    recipe = _recorded_recipe("defense was hardened", record.get("method"), known, objective=given)
    seed = config.seed + 1 if seed is None else seed
    fitted = defense.provenance.get("benign")
    if fitted is not None and (was_frozen(fitted) or not is_labelled(loader)):
        fitted = None
    own = None if fitted is None else _benign_recipe(fitted, config.eps, benign_objective)  # before anything trains
    victim, auxiliary = (public[role] for role in HARDENED_ROLES)
    copies = train_replica(
        victim, auxiliary, loader, config, objective=recipe, seed=seed, folder=folder, progress=progress
    )
    if fitted is None:
        return copies
    began = as_encoder("benign", public["benign"] if third else auxiliary)
    sources = {**copies, "benign": began}
    if REFERENCE in defense.encoders:
        sources[REFERENCE] = as_encoder(REFERENCE, victim)
    benign_config = replace(BenignConfig.from_dict(fitted["config"]), seed=seed, freeze_encoder=False)
    method = fitted["method"]
    checkpoints = None
    if folder is not None:
        made_by = digest([sources, digest_data(loader), benign_config, method, config.eps])
        checkpoints = Path(folder) / shortened(made_by)
    branch, _ = train_benign(
        began,
        loader,
        benign_config,
        objective=own,
        known=sources,
        eps=config.eps,
        bank_dir=None if folder is None else Path(folder) / "bank",
        checkpoint_dir=checkpoints,
        resume=folder is not None,
        progress=progress,
    )
    return {**copies, "benign": cast(Encoder, branch.encoder).requires_grad_(False)}


def has_third(defense: ZePAD) -> bool:
    """Return whether the benign branch began with an encoder of its own, not with a copy of the auxiliary."""
    if "benign" in defense.provenance.get("preset", {}):
        return True
    # Models of earlier versions do not say so: an encoder of another kind than the auxiliary is no copy of it.
    own, auxiliary = (defense.encoder(role) for role in ("benign", "auxiliary"))
    shapes = [{key: value.shape for key, value in encoder.state_dict().items()} for encoder in (own, auxiliary)]
    return own.spec != auxiliary.spec or shapes[0] != shapes[1]


def _benign_recipe(record: Mapping[str, Any], eps: float, given: Recipe | None) -> Recipe | None:
    """Return the recipe that a recorded benign branch was trained by; None where it saw clean images alone."""
    if given is None and record["method"] == benign_recipe().name:
        return None
    own = [preset.benign_objective(eps) for preset in PRESETS.values() if preset.benign_objective is not None]
    known = [*own, static_adversarial_training()]
    return _recorded_recipe("benign branch was trained", record["method"], known, benign_objective=given)


def _recorded_recipe(did: str, method: str | None, known: Sequence[Recipe], **given: Recipe | None) -> Recipe:
    """Return the recipe of a recorded name: the one that was given by an argument's name, or else a known one."""
    ((argument, own),) = given.items()
    for recipe in known if own is None else [own]:
        if recipe.name == method:
            return recipe
    raise ConfigError(
        f"the {did} by {method}, which is "
        + (f"not {own.name}." if own is not None else "no recipe of default settings.")
        + f" Pass that recipe to zepad.protocols.replica_of: {argument}=..."
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

"""Experiments of the field, one call each: matched, transfer, and the ablation of the paper."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from .arguments import check_fields, checked
from .attacks import UniversalPerturbation
from .config import BenignConfig, HardenConfig, HeadConfig, check_budget, require
from .encoders import Encoder, EncoderLike, build_encoder, probe
from .encoders.given import as_encoder
from .ensemble import BranchEnsemble
from .errors import ConfigError, InputError
from .evaluation import (
    Attacker,
    EvalReport,
    UniversalAttack,
    evaluate,
    keeping,
    published,
    replica,
    replica_with_labels,
    save_report,
    semi_black_box,
    semi_black_box_plus,
    universal_attacker,
    universal_attacks,
    universal_feature_attack,
    white_box,
)
from .evaluation.identity import digest
from .evaluation.kept import digest_data
from .evaluation.resuming import check_resumable
from .evaluation.state import check_recipe
from .model import ZePAD
from .modules import Branch
from .objectives import (
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
from .presets import PRESETS
from .training import fit_heads, harden
from .training.hardening import as_recipe
from .types import HARDENED_ROLES, REFERENCE, Loader, Role

_RECIPES = (fare, gen_af, mart, pgd_at, restoration, static_adversarial_training, trades)
_SHOWN = 16  # hexadecimal digits of a digest in the name of a folder

_ATTACK_SETTINGS = ("eps", "steps", "queries", "plus", "published")  # of a protocol, beside its universal attacks

ABLATION = ("nothing", "no adversarial tuning", "no MPAE", "no BMP", "all")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a defense is trained and attacked in an experiment.

    Attributes:
        eps: L-infinity budget of every attack, in [0, 1] pixel units; the paper's is 10/255.
        harden: Settings of hardening.
        benign: Settings of fitting the benign branch.
        heads: Settings of fitting the heads.
        steps: Number of steps of the per-image attacks.
        queries: Number of queries of Square.
        universal: Universal attacks on public encoders by name; None takes the five defaults at `eps`. Unless there are
            none, copies and hardened encoders are attacked by `UniversalFeatureAttack`.
        plus: Attack both public encoders at once too (semi-black-box+).
        published: Attack the hardened encoders of each `ZePAD` too (published).
        seed: Seed of the attacks and the evaluation; the training settings have seeds of their own.
        progress: Show progress bars.
    """

    eps: float = 10 / 255
    harden: HardenConfig = field(default_factory=HardenConfig)
    benign: BenignConfig = field(default_factory=BenignConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    steps: int = 50
    queries: int = 1000
    universal: Mapping[str, UniversalAttack] | None = None
    plus: bool = True
    published: bool = True
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_fields(self)
        check_budget(self.eps)
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.queries >= 1, "queries", self.queries, "at least 1")


@checked
def matched(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    train_loader: Loader,
    test_loader: Loader,
    *,
    protocol: Protocol = Protocol(),
    folder: str | Path | None = None,
) -> dict[str, EvalReport]:
    """Tune and test on one data set: an undefended classifier on the victim beside ZePAD.

    Args:
        victim: The public encoder; not modified.
        auxiliary: The second public encoder; not modified.
        train_loader: Yields `(images, labels)`; hardens, fits heads, and is the attacker's surrogate data.
        test_loader: Yields `(images, labels)` in a fixed order; only scored.
        protocol: Budgets of the attacks and settings of training.
        folder: Folder for a report of each model, in folders named by model; what is found is kept as it comes in
            `folder/state`, and an interrupted evaluation goes on from there.

    Returns:
        Reports by model: `"undefended"` and `"ZePAD"`.

    Raises:
        InputError: If images, labels or encoders do not fit.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers.
    """
    public, defense = _tuned(victim, auxiliary, train_loader, protocol)
    models = {"undefended": _undefended(public["victim"], train_loader, defense, protocol), "ZePAD": defense}
    return _measure_tuned(models, public, defense, train_loader, test_loader, "matched", protocol, folder)


@checked
def transfer(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    tune_loader: Loader,
    task_loader: Loader,
    test_loader: Loader,
    *,
    protocol: Protocol = Protocol(),
    folder: str | Path | None = None,
) -> dict[str, EvalReport]:
    """Harden on one data set, fit the heads on another and test there: fine-tune once, defend everywhere.

    All three encoders come from `tune_loader`, the benign one included; the task sees new heads alone. The attacker's
    surrogate data is `tune_loader`: the downstream task is unknown to whoever attacks the encoders.

    Args:
        victim: The public encoder; not modified.
        auxiliary: The second public encoder; not modified.
        tune_loader: Yields `(images, labels)` of the data the encoders are hardened on.
        task_loader: Yields `(images, labels)` of the downstream task.
        test_loader: Yields `(images, labels)` of the same task in a fixed order; only scored.
        protocol: Budgets of the attacks and settings of training.
        folder: Folder for a report of each model, in folders named by model; what is found is kept as it comes in
            `folder/state`, and an interrupted evaluation goes on from there.

    Returns:
        Reports by model: `"undefended"` and `"ZePAD"`.

    Raises:
        InputError: If images, labels or encoders do not fit.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers.
    """
    public, defense = _tuned(victim, auxiliary, tune_loader, protocol)
    defense.fit_heads(task_loader, protocol.heads, progress=protocol.progress)
    models = {"undefended": _undefended(public["victim"], task_loader, defense, protocol), "ZePAD": defense}
    return _measure_tuned(models, public, defense, tune_loader, test_loader, "transfer", protocol, folder)


@checked
def ablation(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    train_loader: Loader,
    test_loader: Loader,
    *,
    protocol: Protocol = Protocol(),
    folder: str | Path | None = None,
) -> dict[str, EvalReport]:
    """Take each part of the method away, as the paper's ablation does.

    One defense is trained and taken apart: `"nothing"` is the undefended classifier, `"no adversarial tuning"` fuses
    the two public encoders as they are with the benign branch, `"no MPAE"` fuses one hardened encoder with the benign
    branch (the paper does not say what is left; this is our reading), `"no BMP"` fuses the two hardened branches, and
    `"all"` is ZePAD.

    Args:
        victim: The public encoder; not modified.
        auxiliary: The second public encoder; not modified.
        train_loader: Yields `(images, labels)`; hardens, fits heads, and is the attacker's surrogate data.
        test_loader: Yields `(images, labels)` in a fixed order; only scored.
        protocol: Budgets of the attacks and settings of training.
        folder: Folder for a report of each model, in folders named by model; what is found is kept as it comes in
            `folder/state`, and an interrupted evaluation goes on from there.

    Returns:
        Reports by what is taken away, in that order.

    Raises:
        InputError: If images, labels or encoders do not fit.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), ablation study.
    """
    public, defense = _tuned(victim, auxiliary, train_loader, protocol)
    clean = _with_heads(public, train_loader, defense, protocol)
    benign = defense.branch("benign")
    hardened: dict[str, Branch] = {role: defense.branch(role) for role in HARDENED_ROLES}
    threshold = defense.threshold
    models: dict[str, nn.Module] = {
        "nothing": clean["victim"],
        "no adversarial tuning": BranchEnsemble({**clean, "benign": benign}, threshold=threshold),
        "no MPAE": BranchEnsemble({"victim": hardened["victim"], "benign": benign}, threshold=threshold),
        "no BMP": BranchEnsemble(hardened),
        "all": defense,
    }
    assert tuple(models) == ABLATION
    return _measure_tuned(models, public, defense, train_loader, test_loader, "ablation", protocol, folder)


def _tuned(
    victim: EncoderLike, auxiliary: EncoderLike, loader: Loader, protocol: Protocol
) -> tuple[dict[str, Encoder], ZePAD]:
    """Return the public encoders as they were, and the defense built on copies of them."""
    defense = ZePAD.from_encoders(victim, auxiliary)
    public = {role: copy.deepcopy(defense.encoder(role)) for role in HARDENED_ROLES}
    defense.harden(loader, protocol.harden, progress=protocol.progress)
    defense.fit_benign(loader, protocol.benign, head_config=protocol.heads, progress=protocol.progress)
    return {role: encoder.to(defense.device) for role, encoder in public.items()}, defense


def _with_heads(
    encoders: Mapping[str, Encoder], loader: Loader, defense: ZePAD, protocol: Protocol
) -> dict[str, Branch]:
    assert defense.num_classes is not None
    heads = fit_heads(
        encoders,
        loader,
        protocol.heads,
        channels=defense.channels,
        num_classes=defense.num_classes,
        progress=protocol.progress,
    )
    return {role: Branch(encoders[role], head).eval() for role, head in heads.items()}


def _undefended(encoder: Encoder, loader: Loader, defense: ZePAD, protocol: Protocol) -> Branch:
    return _with_heads({"victim": encoder}, loader, defense, protocol)["victim"]


def _measure_tuned(
    models: Mapping[str, nn.Module],
    public: Mapping[str, Encoder],
    defense: ZePAD,
    surrogate: Loader,
    test_loader: Loader,
    data: str,
    protocol: Protocol,
    folder: str | Path | None,
) -> dict[str, EvalReport]:
    assert defense.num_classes is not None
    reports = measure(
        models,
        test_loader,
        public=public,
        surrogate=surrogate,
        num_classes=defense.num_classes,
        data=data,
        protocol=protocol,
        folder=folder,
    )
    if folder is not None:
        save_reports(reports, folder)
    return reports


@checked
def save_reports(reports: Mapping[str, EvalReport], folder: str | Path) -> None:
    """Write each report into a folder of its own, named by its model.

    Args:
        reports: Reports by model.
        folder: Created if need be.

    Raises:
        InputError: If the folder cannot be written.
    """
    for name, report in reports.items():
        save_report(report, Path(folder) / slug(name))


def slug(name: str) -> str:
    """Return a name as one part of a path: `"no BMP"` as `"no-bmp"`."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"


@checked
def measure(
    models: Mapping[str, nn.Module],
    test_loader: Loader,
    *,
    public: Mapping[str, Encoder],
    surrogate: Loader,
    num_classes: int,
    data: str = "data",
    protocol: Protocol = Protocol(),
    folder: str | Path | None = None,
    perturbations: Sequence[UniversalPerturbation] = (),
    others: Mapping[str, Encoder] | None = None,
    copies: Mapping[str, nn.Module] | None = None,
) -> dict[str, EvalReport]:
    """Evaluate several models by the same attackers, and each by those who know it.

    Attackers who know public encoders or copies of the hardened ones are the same for every model. Those who know the
    published encoders, which a `ZePAD` alone has, and the white box are made for each.

    Args:
        models: Images to logits `(N, K)`, by name.
        test_loader: Yields `(images, labels)` in a fixed order.
        public: The public encoders as they were before any hardening: `"victim"` and, for attackers who know both,
            `"auxiliary"`; whichever is missing is not attacked.
        surrogate: The attacker's surrogate images with labels.
        num_classes: Number of classes of the task.
        data: Name of the data, shown in the reports.
        protocol: Budgets of the attacks.
        folder: Folder whose subfolder `state` keeps what is found as it comes, and `perturbations` the universal
            perturbations; an interrupted evaluation goes on from there, and crafts nothing again.
        perturbations: Universal perturbations fitted before, as further semi-black-box attackers.
        others: Further public encoders by name, which the models were not built on, for semi-black-box attackers.
        copies: Copies of the hardened encoders by role, for replica attackers (`train_replica`). Copies with heads of
            the task (`replica_branches`) are also attacked with labels, and the worst case of the replica attackers
            then includes an attacker who knows the task.

    Returns:
        Reports by model.

    Raises:
        InputError: If images, labels or models do not fit, or an attack leaves its own ball.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers, which is found before any
            attacker is made.
    """
    common = [
        universal_attacker(perturbation, name=f"{perturbation.provenance.get('attack', 'universal')} #{number}")
        for number, perturbation in enumerate(perturbations, start=1)
    ]
    if folder is not None:
        parts = _recipe(protocol, public, surrogate, perturbations, others or {}, copies or {})
        for name, model in models.items():
            check_resumable(state_folder(folder, name), model, test_loader, seed=protocol.seed)
            check_recipe(state_folder(folder, name), parts)
    attacks = _UniversalAttacks.of(protocol, folder)
    common += _shared_attackers(public, others or {}, copies or {}, surrogate, attacks, protocol)
    reports = {}
    for name, model in models.items():
        own = _published(model, public, surrogate, attacks, protocol) if protocol.published else []
        own += white_box(
            model, eps=protocol.eps, num_classes=num_classes, steps=protocol.steps, queries=protocol.queries
        )
        reports[name] = evaluate(
            model,
            test_loader,
            [*common, *own],
            name=name,
            data=data,
            folder=None if folder is None else state_folder(folder, name),
            resume=folder is not None,
            seed=protocol.seed,
            progress=protocol.progress,
        )
    return reports


def state_folder(folder: str | Path, model: str) -> Path:
    """Return where `measure` keeps what it finds for one model."""
    return Path(folder) / "state" / slug(model)


def _recipe(
    protocol: Protocol,
    public: Mapping[str, Encoder],
    surrogate: Loader,
    perturbations: Sequence[UniversalPerturbation],
    others: Mapping[str, Encoder],
    copies: Mapping[str, nn.Module],
) -> dict[str, str]:
    """Return what attackers are made from, each as a short text that differs where it differs."""
    parts: dict[str, str] = {name: repr(getattr(protocol, name)) for name in _ATTACK_SETTINGS}
    if protocol.universal is not None:
        parts["universal attacks"] = _marked(protocol.universal)
    parts["public encoders"] = _marked(public)
    parts["images of the attacker"] = digest_data(surrogate)[:_SHOWN]
    parts["perturbations"] = _marked({f"#{number}": found for number, found in enumerate(perturbations, start=1)})
    return {**parts, "other encoders": _marked(others), "copies": _marked(copies)}


def _marked(parts: Mapping[str, Any]) -> str:
    return f"{', '.join(parts)} {digest(parts)[:_SHOWN]}" if parts else "none"


class _UniversalAttacks(NamedTuple):
    """Universal attacks by name: those on public encoders, and the cheap one on copies and hardened encoders."""

    on_public: dict[str, UniversalAttack]
    on_hardened: dict[str, UniversalAttack]

    @classmethod
    def of(cls, protocol: Protocol, folder: str | Path | None) -> _UniversalAttacks:
        """Return the attacks of a protocol, which keep their perturbations where there is a folder."""
        chosen = protocol.universal
        attacks = universal_attacks(eps=protocol.eps, seed=protocol.seed) if chosen is None else dict(chosen)
        cheap = universal_feature_attack(eps=protocol.eps, seed=protocol.seed) if attacks else {}
        if folder is None:
            return cls(attacks, cheap)
        kept = Path(folder) / "perturbations"
        return cls(keeping(attacks, kept), keeping(cheap, kept))


def _shared_attackers(
    public: Mapping[str, Encoder],
    others: Mapping[str, Encoder],
    copies: Mapping[str, nn.Module],
    surrogate: Loader,
    attacks: _UniversalAttacks,
    protocol: Protocol,
) -> list[Attacker]:
    """Return the attackers who never saw any of the models."""
    settings: dict[str, Any] = {"eps": protocol.eps, "seed": protocol.seed, "progress": protocol.progress}
    attackers: list[Attacker] = []
    if "victim" in public:
        attackers += semi_black_box(public["victim"], surrogate, universal=attacks.on_public, others=others, **settings)
    if protocol.plus and {"victim", "auxiliary"} <= set(public):
        attackers += semi_black_box_plus(
            public["victim"], public["auxiliary"], surrogate, universal=attacks.on_public, **settings
        )
    if copies:
        bare = {role: part.encoder if isinstance(part, Branch) else part for role, part in copies.items()}
        attackers += replica(bare, public, surrogate, universal=attacks.on_hardened, **settings)
        if all(isinstance(part, Branch) and part.has_head for part in copies.values()):
            attackers += replica_with_labels(copies, eps=protocol.eps, steps=protocol.steps)
    return attackers


def _published(
    model: nn.Module,
    public: Mapping[str, Encoder],
    surrogate: Loader,
    attacks: _UniversalAttacks,
    protocol: Protocol,
) -> list[Attacker]:
    """Return the attackers who have what a model publishes; none where it publishes no hardened encoder."""
    if not isinstance(model, ZePAD):
        return []
    return published(
        {role: model.encoder(role) for role in HARDENED_ROLES},
        surrogate,
        eps=protocol.eps,
        public=public,
        universal=attacks.on_hardened,
        progress=protocol.progress,
    )


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

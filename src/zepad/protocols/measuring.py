"""The evaluation of one or many models by every attacker that there can be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..arguments import checked
from ..attacks import UniversalPerturbation
from ..digests import shortened
from ..encoders import Encoder
from ..evaluation import (
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
from ..evaluation.identity import digest
from ..evaluation.kept import digest_data
from ..evaluation.resuming import check_resumable
from ..evaluation.state import check_recipe
from ..model import ZePAD
from ..modules import Branch
from ..types import HARDENED_ROLES, Loader
from .protocol import Protocol

_ATTACK_SETTINGS = ("eps", "steps", "queries", "plus", "published")  # of a protocol, beside its universal attacks


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
        public: The public encoders as they were before any training: `"victim"`, for attackers who know both
            `"auxiliary"`, and the third one that a benign branch began with, where there is one, as `"benign"`;
            whichever is missing is not attacked.
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
    parts["images of the attacker"] = shortened(digest_data(surrogate))
    parts["perturbations"] = _marked({f"#{number}": found for number, found in enumerate(perturbations, start=1)})
    return {**parts, "other encoders": _marked(others), "copies": _marked(copies)}


def _marked(parts: Mapping[str, Any]) -> str:
    return f"{', '.join(parts)} {shortened(digest(parts))}" if parts else "none"


class _UniversalAttacks(NamedTuple):
    """Universal attacks by name: those on the public victim, and the cheap one on every other set of encoders."""

    on_victim: dict[str, UniversalAttack]
    elsewhere: dict[str, UniversalAttack]

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
        attackers += semi_black_box(public["victim"], surrogate, universal=attacks.on_victim, others=others, **settings)
    if protocol.plus and {"victim", "auxiliary"} <= set(public):
        attackers += semi_black_box_plus(
            public["victim"],
            public["auxiliary"],
            surrogate,
            universal=attacks.elsewhere,
            further={role: encoder for role, encoder in public.items() if role not in HARDENED_ROLES},
            **settings,
        )
    if copies:
        bare = {role: part.encoder if isinstance(part, Branch) else part for role, part in copies.items()}
        attackers += replica(bare, public, surrogate, universal=attacks.elsewhere, **settings)
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
        universal=attacks.elsewhere,
        progress=protocol.progress,
    )

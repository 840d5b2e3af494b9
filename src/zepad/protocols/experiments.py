"""Experiments of the field, one call each: matched, transfer, and the ablation of the paper."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..arguments import checked
from ..encoders import Encoder, EncoderLike
from ..ensemble import BranchEnsemble
from ..evaluation import EvalReport
from ..model import ZePAD
from ..modules import Branch
from ..presets import RECOMMENDED
from ..training import fit_heads
from ..types import HARDENED_ROLES, Loader
from .measuring import measure, save_reports
from .protocol import Protocol

ABLATION = ("nothing", "no adversarial tuning", "no MPAE", "no BMP", "all")


@checked
def matched(
    victim: EncoderLike,
    auxiliary: EncoderLike,
    train_loader: Loader,
    test_loader: Loader,
    *,
    preset: str = RECOMMENDED,
    protocol: Protocol = Protocol(),
    folder: str | Path | None = None,
) -> dict[str, EvalReport]:
    """Tune and test on one data set: an undefended classifier on the victim beside ZePAD.

    Args:
        victim: The public encoder; not modified.
        auxiliary: The second public encoder; not modified.
        train_loader: Yields `(images, labels)`; hardens, fits heads, and is the attacker's surrogate data.
        test_loader: Yields `(images, labels)` in a fixed order; only scored.
        preset: How the defense is trained and fused, by the attacker that is feared (`zepad.presets.PRESETS`).
        protocol: Budgets of the attacks and settings of training.
        folder: Folder for a report of each model, in folders named by model; what is found is kept as it comes in
            `folder/state`, and an interrupted evaluation goes on from there.

    Returns:
        Reports by model: `"undefended"` and `"ZePAD"`.

    Raises:
        ConfigError: If there is no preset of that name.
        InputError: If images, labels or encoders do not fit.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers.
    """
    public, defense = _tuned(victim, auxiliary, train_loader, preset, protocol)
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
    preset: str = RECOMMENDED,
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
        preset: How the defense is trained and fused, by the attacker that is feared (`zepad.presets.PRESETS`).
        protocol: Budgets of the attacks and settings of training.
        folder: Folder for a report of each model, in folders named by model; what is found is kept as it comes in
            `folder/state`, and an interrupted evaluation goes on from there.

    Returns:
        Reports by model: `"undefended"` and `"ZePAD"`.

    Raises:
        ConfigError: If there is no preset of that name.
        InputError: If images, labels or encoders do not fit.
        CheckpointError: If `folder` holds evaluations of other models, data or attackers.
    """
    public, defense = _tuned(victim, auxiliary, tune_loader, preset, protocol)
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
    `"all"` is ZePAD. The defense is trained by the objective of the paper, and its fusion stays the same throughout.

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
    public, defense = _tuned(victim, auxiliary, train_loader, "paper", protocol)
    clean = _with_heads(public, train_loader, defense, protocol)
    benign = defense.branch("benign")
    hardened: dict[str, Branch] = {role: defense.branch(role) for role in HARDENED_ROLES}
    fusion, threshold = defense.fusion, defense.threshold
    models: dict[str, nn.Module] = {
        "nothing": clean["victim"],
        "no adversarial tuning": BranchEnsemble({**clean, "benign": benign}, fusion=fusion, threshold=threshold),
        "no MPAE": BranchEnsemble({"victim": hardened["victim"], "benign": benign}, fusion=fusion, threshold=threshold),
        "no BMP": BranchEnsemble(hardened, fusion=fusion),
        "all": defense,
    }
    assert tuple(models) == ABLATION
    return _measure_tuned(models, public, defense, train_loader, test_loader, "ablation", protocol, folder)


def _tuned(
    victim: EncoderLike, auxiliary: EncoderLike, loader: Loader, preset: str, protocol: Protocol
) -> tuple[dict[str, Encoder], ZePAD]:
    """Return the public encoders as they were, and the defense built on copies of them."""
    defense = ZePAD.from_encoders(victim, auxiliary, preset=preset)
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

"""Ready-made attackers for each threat model, so that every model is measured by the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..attacks import (
    APGD,
    SSP,
    UAP,
    UAPGD,
    AdvEncoder,
    Attack,
    DetectorEvading,
    FeaturePGD,
    JointAPGD,
    PAPBase,
    Square,
    TargetedAPGD,
    UniversalPerturbation,
    cross_entropy,
    dlr,
    fused_by,
    hardened_branches,
    margin,
    mean_logits,
    one_branch,
)
from ..fusion import RFDM
from ..types import Branched, ImageModel, Loader
from .attackers import Attacker, ThreatModel, against, the_model, universal_attacker

_TARGETS = 3  # number of wrong classes that a targeted attack tries, the likeliest first


class UniversalAttack(Protocol):
    """An attack that fits one perturbation for all images on encoders, whatever classifier is built on them."""

    def fit(self, encoder: Any, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Return the perturbation for an encoder, or for a sequence of encoders attacked at once."""


def universal_attacks(*, eps: float, seed: int = 0) -> dict[str, UniversalAttack]:
    """Return the five universal attacks on encoders with their default settings, by name.

    Args:
        eps: L-infinity budget in [0, 1] pixel units; the paper's is 10/255.
        seed: Seed of each attack.

    Examples:
        >>> list(universal_attacks(eps=10 / 255))
        ['AdvEncoder', 'PAP', 'UAP', 'UAPGD', 'SSP']
    """
    return {
        "AdvEncoder": AdvEncoder(eps=eps, seed=seed),
        "PAP": PAPBase(eps=eps, seed=seed),
        "UAP": UAP(eps=eps, seed=seed),
        "UAPGD": UAPGD(eps=eps, seed=seed),
        "SSP": SSP(eps=eps, seed=seed),
    }


def semi_black_box(
    victim: ImageModel,
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Attacker]:
    """Fit the paper's attackers on the public victim encoder: five universal attacks, and a per-image feature attack.

    Args:
        victim: The public encoder, images to features `(N, D)`, as it was before any hardening.
        loader: The attacker's surrogate images with labels; UAP and UAPGD fit a linear probe on them.
        eps: L-infinity budget in [0, 1] pixel units.
        universal: Universal attacks by name; None takes those of `universal_attacks`.
        steps: Number of steps of the feature attack.
        seed: Seed of the attacks.
        progress: Show progress bars.

    Returns:
        One attacker for each universal attack, and the feature attack. They never query the evaluated model, so one
        list serves every model.

    Raises:
        InputError: If images or labels do not fit the attacks.
    """
    return _on_encoders(
        (victim,),
        loader,
        eps=eps,
        universal=universal,
        steps=steps,
        seed=seed,
        threat_model="semi-black-box",
        suffix="",
        progress=progress,
    )


def semi_black_box_plus(
    victim: ImageModel,
    auxiliary: ImageModel,
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Attacker]:
    """Fit the same attackers on both public encoders at once.

    Args:
        victim: The public victim encoder, images to features `(N, D)`, as it was before any hardening.
        auxiliary: The public auxiliary encoder, images to features `(N, D)`, as it was before any hardening.
        loader: The attacker's surrogate images with labels; UAP and UAPGD fit a linear probe on them.
        eps: L-infinity budget in [0, 1] pixel units.
        universal: Universal attacks by name; None takes those of `universal_attacks`.
        steps: Number of steps of the feature attack.
        seed: Seed of the attacks.
        progress: Show progress bars.

    Returns:
        One attacker for each universal attack, and the feature attack. They never query the evaluated model, so one
        list serves every model.

    Raises:
        InputError: If images or labels do not fit the attacks.
    """
    return _on_encoders(
        (victim, auxiliary),
        loader,
        eps=eps,
        universal=universal,
        steps=steps,
        seed=seed,
        threat_model="semi-black-box+",
        suffix=" (both encoders)",
        progress=progress,
    )


def _on_encoders(
    encoders: tuple[ImageModel, ...],
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None,
    steps: int,
    seed: int,
    threat_model: ThreatModel,
    suffix: str,
    progress: bool,
) -> list[Attacker]:
    fitted = [
        universal_attacker(
            attack.fit(encoders, loader, progress=progress), threat_model=threat_model, name=name + suffix
        )
        for name, attack in (universal_attacks(eps=eps, seed=seed) if universal is None else universal).items()
    ]
    per_image = Attacker(
        name=f"feature PGD-{steps}{suffix}",
        threat_model=threat_model,
        attack=FeaturePGD(eps=eps, steps=steps),
        target=against(*encoders),
    )
    return [*fitted, per_image]


def white_box(
    model: ImageModel, *, eps: float, num_classes: int, steps: int = 50, queries: int = 1000
) -> list[Attacker]:
    """Return attackers who know the whole model: APGD-CE, APGD-DLR and Square on its logits.

    On a model of several branches they also attack surrogates of it, because a fusion can hide its gradient: the mean
    of the branches' logits, the hardened branches together, each branch alone, the paper's fusion of the same branches,
    and all branches jointly towards one wrong class; with four classes or more, also the fused logits towards the
    likeliest wrong classes. Where there is a detector, one attacker also keeps its score below the threshold.

    Args:
        model: The model to be evaluated, images to logits `(N, K)`.
        eps: L-infinity budget in [0, 1] pixel units.
        num_classes: Number of classes. With two, the margin takes the place of DLR, which compares three logits.
        steps: Number of steps of each APGD.
        queries: Number of queries of Square.

    References:
        APGD and DLR: Croce and Hein, Reliable Evaluation of Adversarial Robustness, ICML 2020, arXiv 2003.01690.
        Square: Andriushchenko et al., Square Attack, ECCV 2020, arXiv 1912.00049.
    """
    second, shown = (dlr, "DLR") if num_classes >= 3 else (margin, "margin")

    def row(name: str, attack: Attack, target: Callable[[Any], Any] = the_model) -> Attacker:
        return Attacker(name=name, threat_model="white-box", attack=attack, target=target)

    attackers = [
        row(f"APGD-CE-{steps}", APGD(eps=eps, steps=steps, loss_fn=cross_entropy)),
        row(f"APGD-{shown}-{steps}", APGD(eps=eps, steps=steps, loss_fn=second)),
        row(f"Square-{queries}", Square(eps=eps, queries=queries)),
    ]
    if not isinstance(model, Branched):
        return attackers
    if num_classes >= 4:
        attackers.append(row(f"APGD-T-{steps}", TargetedAPGD(eps=eps, steps=steps, classes=_TARGETS)))
    joint = JointAPGD(eps=eps, branch_logits=model.branch_logits, fuse=model.fuse, steps=steps, classes=_TARGETS)
    attackers += [
        row(f"joint APGD-{steps}", joint),
        row(f"APGD-CE-{steps} on mean logits", APGD(eps=eps, steps=steps, loss_fn=cross_entropy), _mean_logits),
        row(f"APGD-{shown}-{steps} on mean logits", APGD(eps=eps, steps=steps, loss_fn=second), _mean_logits),
        row(f"APGD-CE-{steps} on RFDM", APGD(eps=eps, steps=steps, loss_fn=cross_entropy), _by_rfdm),
    ]
    if len(model.branch_names) >= 3:
        attackers.append(row(f"APGD-CE-{steps} on the hardened branches", APGD(eps=eps, steps=steps), _hardened))
    attackers += [
        row(f"APGD-CE-{steps} on the {name} branch", APGD(eps=eps, steps=steps), _branch(index))
        for index, name in enumerate(model.branch_names)
    ]
    if model.threshold is not None:
        evading = DetectorEvading(eps=eps, steps=steps, score=model.score, threshold=model.threshold)
        attackers.append(row(f"detector-evading APGD-{steps}", evading))
    return attackers


def _mean_logits(model: Branched) -> ImageModel:
    return mean_logits(model.branch_logits)


def _by_rfdm(model: Branched) -> ImageModel:
    return fused_by(model.branch_logits, RFDM())


def _hardened(model: Branched) -> ImageModel:
    return hardened_branches(model.branch_logits)


def _branch(index: int) -> Callable[[Branched], ImageModel]:
    return lambda model: one_branch(model.branch_logits, index)

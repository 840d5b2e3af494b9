"""Ready-made attackers for each threat model, so that every model is measured by the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import checked
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
    UniversalFeatureAttack,
    UniversalPerturbation,
    cross_entropy,
    dlr,
    fused_by,
    hardened_branches,
    margin,
    mean_logits,
    one_branch,
)
from ..errors import InputError
from ..fusion import RFDM
from ..progress import stage
from ..types import Abstaining, Branched, ImageModel, Loader
from .attackers import Attacker, ThreatModel, against, the_model, universal_attacker

_TARGETS = 3  # number of wrong classes that a targeted attack tries, the likeliest first
_NO_ENCODERS: Mapping[str, ImageModel] = MappingProxyType({})
_NO_ATTACKS: Mapping[str, UniversalAttack] = MappingProxyType({})


@runtime_checkable
class UniversalAttack(Protocol):
    """An attack that fits one perturbation for all images on encoders, whatever classifier is built on them."""

    def fit(self, encoder: Any, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Return the perturbation for an encoder, or for a sequence of encoders attacked at once."""


@checked
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
        "AdvEncoder": AdvEncoder(eps=eps, seed=seed, precision="auto"),
        "PAP": PAPBase(eps=eps, seed=seed, precision="auto"),
        "UAP": UAP(eps=eps, seed=seed),  # its backward passes over few images are not faster in bfloat16
        "UAPGD": UAPGD(eps=eps, seed=seed, precision="auto"),
        "SSP": SSP(eps=eps, seed=seed, precision="auto"),
    }


@checked
def universal_feature_attack(*, eps: float, seed: int = 0) -> dict[str, UniversalAttack]:
    """Return the cheapest universal attack with its default settings, by name.

    Args:
        eps: L-infinity budget in [0, 1] pixel units.
        seed: Seed of the attack.
    """
    return {"universal feature attack": UniversalFeatureAttack(eps=eps, seed=seed, precision="auto")}


@checked
def semi_black_box(
    victim: ImageModel,
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None = None,
    others: Mapping[str, ImageModel] = _NO_ENCODERS,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Attacker]:
    """Fit the attackers on the public victim encoder: the paper's six, and one of the transfer literature.

    The paper's are five universal attacks and a per-image feature attack. The other one is the feature attack with
    momentum and input diversity (MI-DI).

    Args:
        victim: The public encoder, images to features `(N, D)`, as it was before any hardening.
        loader: The attacker's surrogate images with labels; UAP and UAPGD fit a linear probe on them.
        eps: L-infinity budget in [0, 1] pixel units.
        universal: Universal attacks by name; None takes those of `universal_attacks`.
        others: Further public encoders by name, images to features, which the defense was not built on. On each of them
            two attackers run the feature attack, without and with momentum and input diversity.
        steps: Number of steps of the feature attack; with momentum and input diversity it takes half as many more.
        seed: Seed of the attacks.
        progress: Show progress bars.

    Returns:
        One attacker for each universal attack, the feature attack, the feature attack with momentum and input
        diversity, and two attackers for each further encoder. They never query the evaluated model, so one list serves
        every model.

    Raises:
        InputError: If images or labels do not fit the attacks.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), threat model. Dong et al., CVPR 2018, arXiv 1710.06081 (momentum); Xie et
        al., CVPR 2019, arXiv 1803.06978 (input diversity).
    """
    suite = _Suite(threat_model="semi-black-box", eps=eps, steps=steps)
    attacks = universal_attacks(eps=eps, seed=seed) if universal is None else universal
    return [
        *suite.universal(attacks, (victim,), loader, progress=progress),
        *suite.per_image((victim,)),
        *(attacker for name, encoder in others.items() for attacker in suite.per_image((encoder,), f" ({name})")),
    ]


@checked
def semi_black_box_plus(
    victim: ImageModel,
    auxiliary: ImageModel,
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None = None,
    further: Mapping[str, ImageModel] = _NO_ENCODERS,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Attacker]:
    """Fit attackers on both public encoders at once, and feature attacks on further ones.

    Args:
        victim: The public victim encoder, images to features `(N, D)`, as it was before any hardening.
        auxiliary: The public auxiliary encoder, images to features `(N, D)`, as it was before any hardening.
        loader: The attacker's surrogate images, with labels if a universal attack needs them.
        eps: L-infinity budget in [0, 1] pixel units.
        universal: Universal attacks by name; None takes `UniversalFeatureAttack` with its default settings.
        further: Further public encoders by name, images to features, which the defense was built on, such as the one
            that its benign branch began with. On each of them, and on all encoders at once, two attackers run the
            feature attack, without and with momentum and input diversity.
        steps: Number of steps of the feature attack; with momentum and input diversity it takes half as many more.
        seed: Seed of the attacks.
        progress: Show progress bars.

    Returns:
        One attacker for each universal attack, the feature attack, the feature attack with momentum and input
        diversity, and two attackers for each set of further encoders. They never query the evaluated model, so one list
        serves every model.

    Raises:
        InputError: If images or labels do not fit the attacks.
    """
    suite = _Suite(threat_model="semi-black-box+", eps=eps, steps=steps)
    attacks = universal_feature_attack(eps=eps, seed=seed) if universal is None else universal
    encoders, suffix = (victim, auxiliary), " (both encoders)"
    fitted = suite.universal(attacks, encoders, loader, suffix, progress=progress)
    sets: dict[str, tuple[ImageModel, ...]] = {name: (encoder,) for name, encoder in further.items()}
    if further:
        sets["all encoders"] = (*encoders, *further.values())
    return [
        *fitted,
        *suite.per_image(encoders, suffix),
        *(attacker for name, members in sets.items() for attacker in suite.per_image(members, f" ({name})")),
    ]


@checked
def replica(
    copies: Mapping[str, ImageModel],
    public: Mapping[str, ImageModel],
    loader: Tensor | Loader,
    *,
    eps: float,
    universal: Mapping[str, UniversalAttack] | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Attacker]:
    """Fit attackers who repeated the hardening: feature attacks on their copies, and on all encoders they have.

    Args:
        copies: The hardened copies by role, images to features `(N, D)`, such as
            `zepad.protocols.train_replica` returns. A copy of the benign branch's encoder is called `"benign"`.
        public: The public encoders by name, images to features `(N, D)`, as they were before any hardening.
        loader: The attacker's surrogate images, with labels if a universal attack needs them.
        eps: L-infinity budget in [0, 1] pixel units.
        universal: Universal attacks by name; None takes `UniversalFeatureAttack` with its default settings.
        steps: Number of steps of the feature attack; with momentum and input diversity it takes half as many more.
        seed: Seed of the attacks.
        progress: Show progress bars.

    Returns:
        One attacker on all copies for each universal attack; feature attacks on each copy, on the hardened ones, on all
        copies, and on copies and public encoders together; the last also with momentum and input diversity. These last
        two are the dearest and by themselves the weakest, and attack only the images that the others leave
        (`Attacker.remaining`). One list serves every model that was hardened alike.

    Raises:
        InputError: If there is no copy, or images or labels do not fit the attacks.
    """
    suite = _Suite(threat_model="replica", eps=eps, steps=steps)
    attacks = universal_feature_attack(eps=eps, seed=seed) if universal is None else universal
    own, everything = _members(copies, "copies"), (*copies.values(), *public.values())
    return [
        *suite.universal(attacks, own, loader, " (copies)", progress=progress),
        *(suite.feature_attack(members, f" ({name})") for name, members in _parts(copies).items()),
        suite.feature_attack(own, " (copies)"),
        *suite.per_image(everything, " (copies and public encoders)" if public else " (all copies)", remaining=True),
    ]


@checked
def replica_with_labels(copies: Mapping[str, ImageModel], *, eps: float, steps: int = 20) -> list[Attacker]:
    """Return attackers who repeated the hardening and have labels of the task: APGD-CE through copies with heads.

    They know the task, so their images are no downstream-agnostic adversarial examples.

    Args:
        copies: The hardened copies with heads of the attacker's own by role, images to logits `(N, K)`, such as
            `zepad.protocols.replica_branches` returns.
        eps: L-infinity budget in [0, 1] pixel units.
        steps: Number of steps of APGD.

    Returns:
        One attacker on the mean of all copies' logits, and where there is a copy of the benign branch one on that of
        the others.

    Raises:
        InputError: If there is no copy.
    """
    sets = {"the copies": _members(copies, "copies")}
    hardened = _without_benign(copies)
    if 0 < len(hardened) < len(copies):
        sets["the hardened copies"] = hardened
    return [
        Attacker(
            name=f"APGD-CE-{steps} (mean logits of {name})",
            threat_model="replica",
            attack=APGD(eps=eps, steps=steps, loss_fn=cross_entropy),
            target=against(mean_logits(_Stacked(members))),
        )
        for name, members in sets.items()
    ]


@checked
def published(
    encoders: Mapping[str, ImageModel],
    loader: Tensor | Loader | None = None,
    *,
    eps: float,
    public: Mapping[str, ImageModel] = _NO_ENCODERS,
    universal: Mapping[str, UniversalAttack] = _NO_ATTACKS,
    steps: int = 20,
    progress: bool = True,
) -> list[Attacker]:
    """Fit attackers who have the hardened encoders, but neither heads nor the benign branch: feature attacks on them.

    Args:
        encoders: The hardened encoders by name, images to features `(N, D)`, such as those of `"victim"` and
            `"auxiliary"`.
        loader: The attacker's surrogate images, with labels if a universal attack needs them; only `universal` reads
            them.
        eps: L-infinity budget in [0, 1] pixel units.
        public: The public encoders by name, as they were before any hardening; they are attacked along.
        universal: Universal attacks by name, none by default.
        steps: Number of steps of the feature attack; with momentum and input diversity it takes half as many more.
        progress: Show progress bars.

    Returns:
        For each universal attack one attacker on all hardened encoders at once; feature attacks on each hardened
        encoder, on all of them at once, and together with the public encoders; the last one also with momentum and
        input diversity. The two on hardened and public encoders attack only the images that the others leave
        (`Attacker.remaining`).

    Raises:
        InputError: If there is no encoder, there are universal attacks but no images for them, or images or labels do
            not fit the attacks.
    """
    suite = _Suite(threat_model="published", eps=eps, steps=steps)
    own, suffix = _members(encoders, "encoders"), " (hardened encoders)"
    attackers: list[Attacker] = []
    if universal:
        if loader is None:
            raise InputError("universal attacks are fitted to images, and there are none. Pass the attacker's loader.")
        attackers += suite.universal(universal, own, loader, suffix, progress=progress)
    attackers += [suite.feature_attack((encoder,), f" (hardened {name})") for name, encoder in encoders.items()]
    if not public:
        return [*attackers, *suite.per_image(own, suffix)]
    together = suite.per_image((*own, *public.values()), " (hardened and public encoders)", remaining=True)
    return [*attackers, suite.feature_attack(own, suffix), *together]


@checked
def white_box(
    model: ImageModel, *, eps: float, num_classes: int, steps: int = 50, queries: int = 1000
) -> list[Attacker]:
    """Return attackers who know the whole model: APGD-CE, APGD-DLR and Square on its logits.

    On a model of several branches they also attack surrogates of it, because a fusion can hide its gradient: the mean
    of the branches' logits, the hardened branches together, each branch alone, the paper's fusion of the same branches,
    and all branches jointly towards one wrong class; with four classes or more, also the fused logits towards the
    likeliest wrong classes. Where there is a detector, one attacker also keeps its score below the threshold; where the
    benign branch can abstain, one keeps the restoration gap below that at which it does.

    APGD-CE on the logits, those on each branch alone and the one past the detector attack every image. All others
    attack only the images that those before them leave, as in AutoAttack (`Attacker.remaining`).

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
    ce = APGD(eps=eps, steps=steps, loss_fn=cross_entropy)
    margins = APGD(eps=eps, steps=steps, loss_fn=second)

    def row(name: str, attack: Attack, target: Callable[[Any], Any] = the_model, **settings: Any) -> Attacker:
        return Attacker(name=name, threat_model="white-box", attack=attack, target=target, **settings)

    remaining = partial(row, remaining=True)
    attackers = [row(f"APGD-CE-{steps}", ce), remaining(f"APGD-{shown}-{steps}", margins)]
    square = remaining(f"Square-{queries}", Square(eps=eps, queries=queries))
    if not isinstance(model, Branched):
        return [*attackers, square]
    attackers += [
        row(f"APGD-CE-{steps} on the {name} branch", ce, _branch(index))
        for index, name in enumerate(model.branch_names)
    ]
    if model.threshold is not None:
        evading = DetectorEvading(eps=eps, steps=steps, score=model.score, threshold=model.threshold)
        attackers.append(row(f"detector-evading APGD-{steps}", evading))
    if isinstance(model, Abstaining) and model.abstain_above is not None:
        heard = DetectorEvading(eps=eps, steps=steps, score=model.restoration_gap, threshold=model.abstain_above)
        attackers.append(remaining(f"APGD-{steps} that keeps the benign branch speaking", heard))
    attackers += [
        remaining(f"APGD-CE-{steps} on mean logits", ce, _mean_logits),
        remaining(f"APGD-{shown}-{steps} on mean logits", margins, _mean_logits),
        remaining(f"APGD-CE-{steps} on RFDM", ce, _by_rfdm),
    ]
    if len(model.branch_names) >= 3:
        attackers.append(remaining(f"APGD-CE-{steps} on the hardened branches", ce, _hardened))
    if num_classes >= 4:
        attackers.append(remaining(f"APGD-T-{steps}", TargetedAPGD(eps=eps, steps=steps, classes=_TARGETS)))
    joint = JointAPGD(eps=eps, branch_logits=model.branch_logits, fuse=model.fuse, steps=steps, classes=_TARGETS)
    return [*attackers, remaining(f"joint APGD-{steps}", joint), square]


def _mean_logits(model: Branched) -> ImageModel:
    return mean_logits(model.branch_logits)


def _by_rfdm(model: Branched) -> ImageModel:
    return fused_by(model.branch_logits, RFDM())


def _hardened(model: Branched) -> ImageModel:
    return hardened_branches(model.branch_logits)


def _branch(index: int) -> Callable[[Branched], ImageModel]:
    return lambda model: one_branch(model.branch_logits, index)


@dataclass(frozen=True, kw_only=True)
class _Suite:
    """Attackers of one threat model on encoders, whichever those are."""

    threat_model: ThreatModel
    eps: float
    steps: int

    def universal(
        self,
        attacks: Mapping[str, UniversalAttack],
        encoders: tuple[ImageModel, ...],
        loader: Tensor | Loader,
        suffix: str = "",
        *,
        progress: bool,
    ) -> list[Attacker]:
        """Return one attacker for each universal attack, fitted on all encoders at once."""
        attackers = []
        with stage("universal attacks", total=len(attacks), shown=progress and len(attacks) > 1) as bar:
            for number, (name, attack) in enumerate(attacks.items(), start=1):
                bar.rename(f"universal attack {number} of {len(attacks)}{suffix}")
                found = attack.fit(encoders, loader, progress=progress)
                attackers.append(universal_attacker(found, threat_model=self.threat_model, name=name + suffix))
                bar.advance()
        return attackers

    def per_image(
        self, encoders: tuple[ImageModel, ...], suffix: str = "", *, remaining: bool = False
    ) -> list[Attacker]:
        """Return the feature attack on all encoders at once, without and with momentum and input diversity."""
        steps = math.ceil(1.5 * self.steps)
        transferable = FeaturePGD(eps=self.eps, steps=steps, momentum=1.0, diversity=0.5)
        return [
            self.feature_attack(encoders, suffix, remaining=remaining),
            self._attacker(f"feature MI-DI-{steps}{suffix}", transferable, encoders, remaining),
        ]

    def feature_attack(
        self, encoders: tuple[ImageModel, ...], suffix: str = "", *, remaining: bool = False
    ) -> Attacker:
        """Return the feature attack on all encoders at once."""
        attack = FeaturePGD(eps=self.eps, steps=self.steps)
        return self._attacker(f"feature PGD-{self.steps}{suffix}", attack, encoders, remaining)

    def _attacker(self, name: str, attack: Attack, encoders: tuple[ImageModel, ...], remaining: bool) -> Attacker:
        return Attacker(
            name=name,
            threat_model=self.threat_model,
            attack=attack,
            target=against(*encoders),
            precision="auto",  # it takes the sign of a gradient, for which bfloat16 is precise enough
            remaining=remaining,
        )


class _Stacked(nn.Module):
    """Classifiers that are asked one after another: images to stacked logits `(B, N, K)`."""

    def __init__(self, classifiers: tuple[ImageModel, ...]) -> None:
        super().__init__()
        self.classifiers = classifiers
        self.parts = nn.ModuleList(part for part in classifiers if isinstance(part, nn.Module))  # whose mode is set

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([classifier(images) for classifier in self.classifiers])


def _members(encoders: Mapping[str, ImageModel], name: str) -> tuple[ImageModel, ...]:
    if not encoders:
        raise InputError(f"{name} is empty: pass at least one encoder by name.")
    return tuple(encoders.values())


def _parts(copies: Mapping[str, ImageModel]) -> dict[str, tuple[ImageModel, ...]]:
    """Return each of several copies alone, and those of the hardened encoders where there is one of another kind.

    An attack on all copies at once spends its budget on a benign branch too, which it may not need to.
    """
    if len(copies) == 1:
        return {}
    found = {f"copy of {role}": (copy,) for role, copy in copies.items()}
    hardened = _without_benign(copies)
    return found | ({"hardened copies": hardened} if 1 < len(hardened) < len(copies) else {})


def _without_benign(copies: Mapping[str, ImageModel]) -> tuple[ImageModel, ...]:
    return tuple(copy for role, copy in copies.items() if role != "benign")
